"""Which failures are the machine's and pass: a database, broker or disk that is away, full or too busy.

Every one of them is 503 with `retry-after`, or 507 where bytes have no room; what is not listed here is a bug
of ours and stays 500. Knows drivers' errors, nothing of requests.
"""

from __future__ import annotations

import errno

from kombu.exceptions import LimitExceeded
from kombu.exceptions import OperationalError as BrokerError
from psycopg import DataError, IntegrityError, NotSupportedError, ProgrammingError
from psycopg import Error as DriverError
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError, PendingRollbackError, ResourceClosedError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.core.errors import ServiceError, StorageFull, Unavailable

# SQLSTATE: https://www.postgresql.org/docs/current/errcodes-appendix.html
_CLASSES = frozenset({"08", "28", "3D", "53", "57", "58", "F0", "XX"})
_STATES = frozenset(
    {
        "25006",  # read-only: a standby, or a server whose operator keeps it from writing
        "25P03",  # ended while idle in a transaction
        "25P04",  # the transaction took too long
        "40001",  # serialization failure
        "40003",  # whether the statement was done is not known
        "40P01",  # deadlock
        "42P01",  # no such table, or column: the schema is not of this version yet
        "42703",
        "55006",  # object in use
        "55P03",  # lock not available in time
    }
)
_BUSY = frozenset({"40001", "40P01", "55P03", "57014"})  # somebody else was at it: soon over
_DISK_FULL = "53100"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_DISK = frozenset(
    {errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV, errno.ENXIO, errno.ENOTCONN}
    | {errno.ENOENT, errno.EACCES, errno.EPERM}  # a disk that is not mounted, or not as it should be
)
_MACHINE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOBUFS})


def find_outage(error: BaseException) -> ServiceError | None:
    """What a client is told of this failure; None when it is none of the machine's."""
    if isinstance(error, DBAPIError):
        return _database(error.orig, lost=error.connection_invalidated)
    if isinstance(error, DriverError):
        return _database(error, lost=False)
    if isinstance(error, PoolTimeout | PendingRollbackError | ResourceClosedError):
        return _away("database")
    if isinstance(error, RedisError | BrokerError | LimitExceeded):
        return _away("message broker")
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "new thread" in str(error)):
        return _overloaded()
    return None


def _database(cause: BaseException | None, *, lost: bool) -> ServiceError | None:
    if isinstance(cause, OSError | MemoryError):
        return find_outage(cause)
    if not isinstance(cause, DriverError):
        return _away("database") if lost else None
    state = cause.sqlstate
    if state == _DISK_FULL:
        return full()
    if state in _BUSY:
        return Unavailable("The database is busy with this at the moment. Try again.", retry_after_s=1)
    if lost or _passes(cause, state):
        return _away("database")
    return None


def _passes(cause: DriverError, state: str | None) -> bool:
    if state is None:  # libpq's own: a connection that could not be made, or broke
        return not isinstance(cause, DataError | IntegrityError | NotSupportedError | ProgrammingError)
    return state[:2] in _CLASSES or state in _STATES


def _system(error: OSError) -> ServiceError | None:
    if error.errno in _FULL:
        return full()
    if error.errno in _MACHINE:
        return _overloaded()
    if error.errno in _DISK:
        return Unavailable(
            "The service's storage cannot be reached at the moment. Try again in a few seconds."
        )
    if isinstance(error, ConnectionError | TimeoutError):
        return Unavailable(
            "A part of the service cannot be reached at the moment. Try again in a few seconds."
        )
    return None


def full() -> StorageFull:
    """No room for bytes."""
    return StorageFull(
        "The service's storage is full. Delete files you no longer need, or ask the operator for room.",
        code="storage_full",
    )


def _away(what: str) -> Unavailable:
    return Unavailable(f"The {what} cannot be reached at the moment. Try again in a few seconds.")


def _overloaded() -> Unavailable:
    return Unavailable(
        "The service has more to do than it can hold at the moment. Try again in a few seconds."
    )
