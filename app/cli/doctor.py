"""`luthier doctor`: is everything there that the service needs, and what to do where it is not."""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from app.cli.running import connected_settings
from app.core.base_models import CatalogueError, find_model_dir, load_catalogue
from app.core.settings import Settings

LOW_DISK_BYTES = 5 * 10**9
_OTHER_VARIABLES = ("LUTHIER_API_KEY", "LUTHIER_TEST_WEIGHTS")  # of `up` and of the tests; no settings
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "fastapi", "celery", "sqlalchemy")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `cure` None: all is well; `fatal` False: worth knowing, no failure."""

    what: str
    says: str
    cure: str | None = None
    fatal: bool = True


def examine(data_dir: Path | None) -> int:
    """Print one line a check; exit code 1 when something must be done."""
    settings = connected_settings(data_dir=data_dir)
    failed = False
    for check in CHECKS:
        for finding in check(settings):
            typer.echo(format_finding(finding))
            failed |= finding.cure is not None and finding.fatal
    return 1 if failed else 0


def format_finding(finding: Finding) -> str:
    """`ok`, `note` or `FAIL`, what was looked at, what was found, what to do."""
    mark = "ok" if finding.cure is None else "FAIL" if finding.fatal else "note"
    cure = f" -> {finding.cure}" if finding.cure else ""
    return f"{mark:<5}{finding.what:<12}{finding.says}{cure}"


def check_database(settings: Settings) -> Iterator[Finding]:
    """Reachable, and of the schema this code needs."""
    from sqlalchemy import text
    from sqlalchemy.exc import SQLAlchemyError

    from app.core.db import make_engine
    from app.core.migrate import is_current

    if not settings.database_url:
        yield Finding("database", "no URL", "set LUTHIER_DATABASE_URL, or start luthier up")
        return
    engine = make_engine(settings.database_url)
    try:
        with engine.connect() as connection:
            version = connection.scalar(text("SHOW server_version"))
        current = is_current(engine)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", error)).strip().splitlines()[0]
        yield Finding("database", reason, "start it, or correct LUTHIER_DATABASE_URL")
        return
    finally:
        engine.dispose()
    cure = None if current else "run luthier migrate"
    yield Finding("database", f"PostgreSQL {version}, schema {'current' if current else 'not current'}", cure)


def check_broker(settings: Settings) -> Iterator[Finding]:
    """Reachable and taking messages, and how the workers are that it has heard of."""
    import redis

    from app.core.presence import count_deaf, list_present
    from app.core.queue import Queue
    from app.core.redis_client import make_redis

    if not settings.redis_url:
        yield Finding("broker", "no URL", "set LUTHIER_REDIS_URL, or start luthier up")
        return
    client = make_redis(settings.redis_url)
    try:
        about = client.info("server")
        counts = {
            str(queue): (len(list_present(client, kind=queue)), count_deaf(client, kind=queue))
            for queue in Queue
        }
        client.set("luthier:doctor", "1", px=1000)  # a broker that is full, or a replica, takes no messages
    except redis.RedisError as error:
        yield Finding("broker", str(error), "start it, or correct LUTHIER_REDIS_URL")
        return
    finally:
        client.close()
    name = "Valkey" if "valkey_version" in about else "Redis"
    yield Finding("broker", f"{name} {about.get('valkey_version', about.get('redis_version'))}")
    for queue, (present, deaf) in counts.items():
        yield _workers(queue, present, deaf)


def _workers(queue: str, present: int, deaf: int) -> Finding:
    if deaf:
        says = f"{present} {queue}, and {deaf} that live but get no messages"
        return Finding("workers", says, "they end themselves within a minute; if not, start them again")
    cure = None if present else f"start one: luthier worker --queues {queue}"
    return Finding("workers", f"{present} {queue}", cure, fatal=False)


def check_storage(settings: Settings) -> Iterator[Finding]:
    """Writable, and with room."""
    folder = settings.storage_dir
    while not folder.exists():  # what is made later can be made where its nearest parent is writable
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as probe:
            probe.write(b"x")
    except OSError as error:
        cure = "correct its permissions, or LUTHIER_DATA_DIR and LUTHIER_STORAGE_URL"
        yield Finding("storage", f"{folder}: {error.strerror}", cure)
        return
    yield Finding("storage", f"{settings.storage_dir} is writable")
    free = shutil.disk_usage(folder).free
    low = "free some room, or move LUTHIER_DATA_DIR to another disk"
    yield Finding("disk", f"{free / 1e9:.1f} GB free", low if free < LOW_DISK_BYTES else None)


def check_weights(settings: Settings) -> Iterator[Finding]:
    """The catalogue can be read; which base models are here."""
    try:
        catalogue = load_catalogue(settings.models_file)
    except CatalogueError as error:
        yield Finding("models", str(error), "correct the catalogue")
        return
    for entry in catalogue.entries.values():
        here = find_model_dir(entry, settings.models_dir) is not None
        cure = None if here else f"run luthier models pull {entry.name}"
        yield Finding("models", f"{entry.name} {'is here' if here else 'is not here'}", cure, fatal=False)


def check_device(_settings: Settings) -> Iterator[Finding]:
    """What training and inference run on."""
    try:
        import torch
    except ModuleNotFoundError:
        cure = "where workers shall run: make setup, or pip install '.[worker]' in the clone"
        yield Finding("device", "torch is not installed", cure, fatal=False)
        return
    if not torch.cuda.is_available():
        yield Finding("device", f"CPU, {torch.get_num_threads()} threads; no CUDA device is visible")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("device", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def check_versions(_settings: Settings) -> Iterator[Finding]:
    """Python and the packages whose versions matter most."""
    python = ".".join(str(part) for part in sys.version_info[:3])
    cure = None if (3, 11) <= sys.version_info[:2] <= (3, 13) else "use Python 3.11, 3.12 or 3.13"
    yield Finding("versions", f"Python {python}", cure)
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    yield Finding("versions", ", ".join(found))


def check_variables(_settings: Settings) -> Iterator[Finding]:
    """LUTHIER_ variables that nothing reads: most likely mistyped."""
    known = [*(f"LUTHIER_{name.upper()}" for name in Settings.model_fields), *_OTHER_VARIABLES]
    for name in sorted(os.environ):
        if name.startswith("LUTHIER_") and name.upper() not in known:
            near = difflib.get_close_matches(name, known, n=1)
            cure = f"did you mean {near[0]}?" if near else "docs/operations.md lists all settings"
            yield Finding("variables", f"{name} is unknown and has no effect", cure, fatal=False)


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    check_database,
    check_broker,
    check_storage,
    check_weights,
    check_device,
    check_versions,
    check_variables,
)
