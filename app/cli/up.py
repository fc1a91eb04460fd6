"""`luthier up`: everything on one machine, until a signal says stop."""

from __future__ import annotations

import json
import logging
import shlex
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import typer

from app.cli import startup
from app.cli.addresses import claim_port, local_url
from app.cli.data_dir import locked, prepare_data_dir
from app.cli.process_commands import SOURCE_ROOT
from app.cli.running import forget_urls, write_urls
from app.cli.supervisor import Supervisor
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.migrate import upgrade
from app.core.settings import Settings

log = logging.getLogger(__name__)

EXAMPLE = SOURCE_ROOT / "examples" / "shop" / "train.jsonl"
_SERVICE = ("api", "control", "training", "inference")
_SERVERS = ("valkey", "postgres")
_STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """Ctrl-C, SIGTERM or a closed terminal: no error, everything ends in order."""


def say(line: str) -> None:
    """Tell the operator."""
    typer.echo(line)


def up(settings: Settings, *, api_key: str | None) -> None:
    """Start everything, say so, and keep it running until a signal says stop."""
    with stop_on_signals():
        data_dir = prepare_data_dir(settings.data_dir)
        with locked(data_dir, say) as lock:
            port = claim_port(settings.host, settings.port)
            supervisor = Supervisor(say, inherited=[lock])
            try:
                run(supervisor, settings.model_copy(update={"data_dir": data_dir, "port": port}), api_key)
            except StopRequested:
                say("Stopping.")
            finally:
                ignore_signals()  # a second Ctrl-C must not leave half of it running
                supervisor.stop(_SERVICE)  # together; the API lets go first, so nothing new arrives
                supervisor.stop(_SERVERS)
                forget_urls(data_dir)
    say("Stopped.")


def run(supervisor: Supervisor, settings: Settings, api_key: str | None) -> None:
    """Start all parts and watch them. Ends only by an exception."""
    if not settings.redis_url:
        settings = settings.model_copy(
            update={"redis_url": startup.start_valkey(supervisor, settings.data_dir)}
        )
    if not settings.database_url:
        say("Starting the database.")
        settings = settings.model_copy(
            update={"database_url": startup.start_postgres(supervisor, settings.data_dir)}
        )
    upgrade(settings.database_url)
    write_urls(settings.data_dir, settings)
    secret = startup.ensure_key(settings, settings.data_dir, api_key)
    startup.ensure_weights(settings, say)
    say("Starting the API and the workers.")
    startup.start_service(supervisor, settings)
    say(describe(settings, secret))
    while True:
        supervisor.tick()
        time.sleep(startup.TICK_S)


def describe(settings: Settings, secret: str) -> str:
    """What an operator needs to go on: the URL, the key, lines to try."""
    base = f"{local_url(settings.host, settings.port)}/v1"
    lines = (
        "",
        "Luthier is ready.",
        f"  base URL  {base}",
        f"  API key   {secret}",
        f"  logs      {settings.data_dir / 'logs'}",
        "Try:",
        *(f"  {line}" for line in lines_to_try(base, secret, settings.served_base_models)),
        "Ctrl-C stops everything.",
    )
    return "\n".join(lines)


def lines_to_try(base: str, secret: str, served: Sequence[str]) -> list[str]:
    """For a shell, as they are; the upload only where the example is, which an installed package lacks."""
    messages = [{"role": "user", "content": "Say hello."}]
    question = json.dumps({"model": (*served, DEFAULT_BASE_MODEL)[0], "messages": messages})
    curl = ["curl", "-H", f"Authorization: Bearer {secret}"]
    lines = [
        [*curl, f"{base}/models"],
        [*curl, "-H", "Content-Type: application/json", "-d", question, f"{base}/chat/completions"],
    ]
    if EXAMPLE.is_file():
        lines.append([*curl, "-F", "purpose=fine-tune", "-F", f"file=@{EXAMPLE}", f"{base}/files"])
    return [shlex.join(line) for line in lines]


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn the stopping signals into StopRequested while the block runs."""

    def request(number: int, _frame: FrameType | None) -> None:
        log.info("signal %s", signal.Signals(number).name)
        ignore_signals()
        raise StopRequested

    before = {number: signal.signal(number, request) for number in _STOPPING_SIGNALS}
    try:
        yield
    except StopRequested:
        return  # before anything was started
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """From now on nothing interrupts the stopping."""
    for number in _STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
