"""The steps of `luthier up`: servers, key, weights, service. Each is done or raises a sentence."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from app.cli.addresses import local_url
from app.cli.data_dir import ensure_password, read_secret, write_secret
from app.cli.errors import CommandError
from app.cli.postgres import POSTGRES_GRACE_S, prepare_postgres, wait_for_postgres
from app.cli.process_commands import child_environment, leashed, luthier, service_parts
from app.cli.supervisor import Part, Supervisor
from app.cli.valkey import VALKEY_GRACE_S, prepare_valkey, wait_for_valkey
from app.core.base_models import DEFAULT_BASE_MODEL, find_model_dir, load_catalogue
from app.core.settings import Settings

SERVER_TIMEOUT_S = 120.0  # recovery after a kill, on a slow disk
READY_TIMEOUT_S = 300.0  # cold imports of torch on a slow disk
TICK_S = 0.2
Say = Callable[[str], None]


def start_valkey(supervisor: Supervisor, data_dir: Path) -> str:
    """Start the embedded broker; its URL."""
    command = prepare_valkey(data_dir / "valkey", ensure_password(data_dir / "secrets" / "valkey-password"))
    part = Part("valkey", command.argv, data_dir / "logs" / "valkey.log", grace_s=VALKEY_GRACE_S)
    wait_started(supervisor, part, lambda: wait_for_valkey(command.url, timeout_s=1.0))
    return command.url


def start_postgres(supervisor: Supervisor, data_dir: Path) -> str:
    """Start the embedded database, made at the first call; its URL."""
    password = ensure_password(data_dir / "secrets" / "postgres-password")
    command = prepare_postgres(data_dir / "postgres", password)
    part = Part("postgres", command.argv, data_dir / "logs" / "postgres.log", grace_s=POSTGRES_GRACE_S)
    wait_started(supervisor, part, lambda: wait_for_postgres(command.url, timeout_s=1.0))
    return command.url


def wait_started(supervisor: Supervisor, part: Part, attempt: Callable[[], None]) -> None:
    """Start a server and try until it answers; one that ends meanwhile is an error at once."""
    supervisor.start(part)
    deadline = time.monotonic() + SERVER_TIMEOUT_S
    while True:
        try:
            attempt()
            supervisor.mark_read(part.name)
            return
        except TimeoutError:
            if supervisor.pid(part.name) is None:
                raise CommandError(explain_end(part)) from None
            if time.monotonic() > deadline:
                raise CommandError(
                    f"{part.name} did not answer within {SERVER_TIMEOUT_S:.0f} s; read {part.log_file}."
                ) from None


def explain_end(part: Part) -> str:
    """One sentence for why a part ended, from the last lines of its log."""
    assert part.log_file is not None
    lines = [line for line in part.log_file.read_text(errors="replace").splitlines()[-20:] if line.strip()]
    if any("No space left" in line for line in lines):
        return f"The disk of {part.log_file.parent} is full; free some room or give another --data-dir."
    telling = [line for line in lines if "FATAL" in line or "rror" in line] or lines or ["it said nothing"]
    return f"{part.name} ended as it started: {telling[-1].strip()} - read {part.log_file}."


def ensure_key(settings: Settings, data_dir: Path, api_key: str | None) -> str:
    """A key that opens the first project: the one given, the one of the last run, or a new one."""
    from app.core.db import make_engine, make_sessions, transaction
    from app.core.keys import create_key, ensure_project

    kept = data_dir / "secrets" / "api-key"
    engine = make_engine(settings.database_url)
    try:
        with transaction(make_sessions(engine)) as session:
            project = ensure_project(session, project=settings.project, organization=settings.organization)
            secret = api_key or _still_valid(session, read_secret(kept))
            _, secret = create_key(session, project=project, name="luthier up", secret=secret)
    finally:
        engine.dispose()
    write_secret(kept, secret)
    return secret


def _still_valid(session: object, secret: str | None) -> str | None:
    from sqlalchemy.orm import Session

    from app.core.errors import InvalidKey
    from app.core.keys import authenticate

    assert isinstance(session, Session)
    try:
        if secret is not None:
            authenticate(session, secret)
        return secret
    except InvalidKey:  # revoked, or the database is another one
        return None


def ensure_weights(settings: Settings, say: Say) -> None:
    """Bring the weights the inference worker serves, in a process of its own: converting takes 1.5 GB."""
    catalogue = load_catalogue(settings.models_file)
    for name in settings.served_base_models or (DEFAULT_BASE_MODEL,):
        entry = catalogue.find(name)
        if entry is None:
            raise CommandError(
                f"LUTHIER_INFERENCE_MODELS names '{name}', which is not in the catalogue; "
                f"it holds {', '.join(catalogue.names)}."
            )
        if find_model_dir(entry, settings.models_dir) is None:
            say(f"Fetching the weights of {name}.")
            run_on_leash(luthier("models", "pull", name), child_environment(part_settings(settings)))


def run_on_leash(argv: list[str], environment: dict[str, str]) -> None:
    """Run a command to its end on our terminal; it has said why when it fails."""
    process = subprocess.Popen(leashed(argv), stdin=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    try:
        code = process.wait()
    finally:
        process.stdin.close()
        process.wait()
    if code != 0:
        raise CommandError(f"`luthier {' '.join(argv[4:])}` did not succeed; the line above says why.")


def part_settings(settings: Settings) -> dict[str, str]:
    """The variables every part is given on top of the environment."""
    values = {
        "LUTHIER_DATABASE_URL": settings.database_url,
        "LUTHIER_REDIS_URL": settings.redis_url,
        "LUTHIER_DATA_DIR": str(settings.data_dir.absolute()),
        "LUTHIER_HOST": settings.host,
        "LUTHIER_PORT": str(settings.port),
    }
    if settings.models_file is not None:
        values["LUTHIER_MODELS_FILE"] = str(settings.models_file.absolute())
    return values


def start_service(supervisor: Supervisor, settings: Settings) -> None:
    """Start the API and the workers, and wait until all say they are ready."""
    parts = service_parts(settings.data_dir, part_settings(settings))
    for part in parts:
        supervisor.start(part)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while (missing := find_missing(local_url(settings.host, settings.port))) is not None:
        supervisor.tick()
        for part in parts:
            if supervisor.starts(part.name) > 3:
                raise CommandError(explain_end(part))
        if time.monotonic() > deadline:
            raise CommandError(
                f"Not ready after {READY_TIMEOUT_S:.0f} s ({missing}); "
                f"read the logs in {settings.data_dir / 'logs'}."
            )
        time.sleep(TICK_S)


def find_missing(url: str) -> str | None:
    """What is not ready yet, in the API's own words; None when all is."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as reply:  # noqa: S310 - our own http URL
            json.load(reply)
            return None
    except urllib.error.HTTPError as error:
        with error:
            return error.read(300).decode("utf-8", "replace")
    except (OSError, ValueError):
        return "the API does not answer"
