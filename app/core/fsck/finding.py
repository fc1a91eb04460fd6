"""What a check says about one thing that is wrong, and what every check is given to look at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from app.core.settings import Settings
from app.core.storage import Storage

BUG = "keep the job's rows and report them: a bug of the service, and nothing repairs the past"
HOUSEKEEPING = "nothing, housekeeping does it: a control worker has to run"
Repair = Callable[[Session], bool]  # looks again under a lock; False when there was nothing left to do


class Severity(StrEnum):
    """An error breaks an invariant; a warning is fine on a busy system and no longer on a quiet one."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. `repair` None: an operator has to decide."""

    invariant: str  # I1 … I12
    subject: str
    problem: str
    cure: str
    severity: Severity = Severity.ERROR
    repair: Repair | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What stays the same when the check looks again; numbers in the problem may move."""
        return self.invariant, self.subject, self.cure


@dataclass(frozen=True)
class Site:
    """One installation. `quick` leaves out what reads every byte."""

    sessions: sessionmaker[Session]
    storage: Storage
    settings: Settings
    quick: bool = False
    orphan_age_s: float = 3600.0  # younger bytes without a row may be a publish in flight
    seen: dict[object, str | None] = field(default_factory=dict)  # folders and files already read

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """Rows as they all were at one moment. For reading; keep no disk work inside."""
        with self.sessions() as session:
            session.connection(
                execution_options={"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
            )
            session.execute(text("SET LOCAL statement_timeout = 0"))
            yield session


Check = Callable[[Site], Iterator[Finding]]


def age_s(path: Path, now: float) -> float:
    """Seconds since something at the path last changed, its name included; 0 when it has just gone."""
    with suppress(OSError):
        status = path.lstat()
        return now - max(status.st_mtime, status.st_ctime)
    return 0.0


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, as it is named there."""
    return sorted(path.name for path in folder.iterdir())


def remove(path: Path) -> bool:
    """Remove a file or folder, never what a link points to; whether all of it is gone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return not os.path.lexists(path)
