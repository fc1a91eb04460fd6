"""`luthier api` and `luthier worker`: one process each, or one for each queue named."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

from app.cli.addresses import explain_listening
from app.cli.errors import CommandError
from app.cli.process_commands import child_environment, leashed, luthier, worker_grace_s
from app.cli.running import load_settings
from app.core.queue import Queue
from app.core.settings import Settings


def run_api() -> None:
    """Serve HTTP until told to stop."""
    from app.api.serve import serve
    from app.core.log import configure

    settings = _ready_settings()
    configure("api", level=settings.log_level)
    try:
        serve(settings)
    except OSError as error:
        raise CommandError(explain_listening(error, settings.host, settings.port)) from error


def run_workers(queues: str) -> None:
    """Work on one queue in this process, or on several in a child process each."""
    names = parse_queues(queues)
    settings = _ready_settings()
    if len(names) > 1:
        run_children(names)
        return
    from worker.main import run

    run(settings, names[0])


def parse_queues(text: str) -> list[Queue]:
    """The queues an operator named."""
    try:
        names = [Queue(word.strip()) for word in text.split(",")]
    except ValueError:
        raise CommandError(f"--queues must be some of {','.join(Queue)}, not '{text}'.") from None
    return list(dict.fromkeys(names))


def run_children(queues: list[Queue]) -> None:
    """Keep a process running for each queue until told to stop: their tasks need processes of their own."""
    import typer

    from app.cli.supervisor import Part, Supervisor
    from app.core.log import configure

    configure("worker")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    supervisor = Supervisor(typer.echo)
    for queue in queues:
        grace_s = worker_grace_s(queue)
        argv = leashed(luthier("worker", "--queues", queue), options=("--grace", str(grace_s)))
        supervisor.start(Part(queue, argv, None, env=child_environment({}), grace_s=grace_s, cwd=Path.cwd()))
    while not stop.wait(0.2):
        supervisor.tick()
    supervisor.stop(list(queues))


def _ready_settings() -> Settings:
    settings = load_settings()
    if not settings.database_url or not settings.redis_url:
        raise CommandError(
            "LUTHIER_DATABASE_URL and LUTHIER_REDIS_URL must be set; "
            "or run luthier up, which brings servers of its own."
        )
    return settings
