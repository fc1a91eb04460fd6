"""The database: engine, sessions, and the types every table shares. Knows no table."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import psycopg
from psycopg.errors import ReadOnlySqlTransaction
from psycopg.types.string import StrDumperUnknown
from sqlalchemy import DateTime, Dialect, Engine, MetaData, String, create_engine, event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.types import TypeDecorator


class UtcDateTime(TypeDecorator[datetime]):
    """A moment, aware and in UTC on both sides."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        if value is not None and value.tzinfo is None:
            raise ValueError("naive datetime: every moment carries its zone")
        return value

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)


class Text(TypeDecorator[StrEnum]):
    """A StrEnum stored as its text; a check constraint in the migration holds the values."""

    impl = String
    cache_ok = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__(32)
        self.kind = kind

    def process_bind_param(self, value: StrEnum | None, _dialect: Dialect) -> str | None:
        return None if value is None else str(self.kind(value))

    def process_result_value(self, value: str | None, _dialect: Dialect) -> StrEnum | None:
        return None if value is None else self.kind(value)


class Base(DeclarativeBase):
    """Parent of all tables; constraint names follow one convention so migrations can name them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class _Impatient(psycopg.Connection[Any]):
    """A connection that gives up on a server that is silent far beyond its own limit of a statement: one
    that is frozen, or on a disk that hangs, keeps its lines open and answers never.
    """

    answer_s = 35.0

    def wait(self, gen: Any, interval: float = 0.1, timeout: float | None = None) -> Any:
        """As the driver's, within `answer_s`."""
        deadline = time.monotonic() + self.answer_s
        try:
            return super().wait(gen, interval, self.answer_s if timeout is None else timeout)
        except psycopg.OperationalError:
            if time.monotonic() >= deadline:
                self.close()  # its answer may still come, and would be taken for that of another statement
            raise


def make_engine(
    url: str, *, patience_s: float = 20.0, statement_s: float = 30.0, idle_s: float = 60.0
) -> Engine:
    """An engine whose connections notice a dead server and never wait for one without end.

    `patience_s`: how long to wait for rows that others have locked, and for a connection of the pool.
    `statement_s`: how long one statement may take.
    `idle_s`: how long a transaction may rest between two. The server then ends it: a process that was frozen
    in the middle of one keeps its rows from all others until then.
    """
    kind: type[_Impatient] = type("Connection", (_Impatient,), {"answer_s": statement_s + 2.0})
    # A row in demand is waited for twice, first in line and then for its holder; each may take half.
    lock_ms = round(patience_s / 2 * 1000)
    engine = create_engine(
        url,
        json_serializer=_to_json,
        pool_size=10,
        max_overflow=20,
        pool_pre_ping=True,
        pool_timeout=min(patience_s, 10),
        connect_args={
            "connect_timeout": max(2, min(5, int(patience_s))),  # seconds; below 2 libpq takes 2
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            # Keepalives rest while bytes wait for their acknowledgement; without this a write into a
            # cut line hangs for a quarter of an hour, far past any lease.
            "tcp_user_timeout": 15_000,
            "options": f"-c statement_timeout={statement_s * 1000:.0f} -c lock_timeout={lock_ms}"
            f" -c idle_in_transaction_session_timeout={idle_s * 1000:.0f}",
        },
    )
    event.listen(engine, "do_connect", lambda _d, _r, args, options: kind.connect(*args, **options))
    event.listen(engine, "connect", _speak_storable_text)
    return engine


class _StorableText(StrDumperUnknown):
    """PostgreSQL holds no NUL and no half of a surrogate pair. A text with one is looked up and not found,
    or kept with a substitute, instead of breaking the statement far from where it came in."""

    def dump(self, obj: str) -> bytes:
        return obj.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace")


def _speak_storable_text(connection: Any, _record: Any) -> None:
    connection.adapters.register_dumper(str, _StorableText)


_NUL_IN_JSON = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")


def _to_json(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace").decode()
    return _NUL_IN_JSON.sub("\\1\N{REPLACEMENT CHARACTER}", text)


def make_sessions(engine: Engine) -> sessionmaker[Session]:
    """Sessions whose rows stay readable after the commit."""
    return sessionmaker(engine, expire_on_commit=False)


@contextmanager
def transaction(sessions: sessionmaker[Session]) -> Iterator[Session]:
    """A session that commits at the end of the block, or rolls back."""
    with sessions() as session, session.begin():
        yield session


def is_away(error: Exception) -> bool:
    """Whether the database could not be reached or asks to come back, rather than refused a statement."""
    if isinstance(error, PoolTimeout | OperationalError | InterfaceError):
        return True
    return isinstance(error, DBAPIError) and (
        error.connection_invalidated or isinstance(error.orig, ReadOnlySqlTransaction)
    )


def utc_now() -> datetime:
    """This machine's clock. Leases use the database's clock instead."""
    return datetime.now(UTC)
