"""The states of a job and the moves between them; the only place that names either."""

from __future__ import annotations

from enum import StrEnum


class JobStatus(StrEnum):
    """OpenAI's six, and `paused`."""

    VALIDATING_FILES = "validating_files"  # the control worker reads the files
    QUEUED = "queued"  # waits for a training worker
    RUNNING = "running"  # an attempt holds the lease
    PAUSED = "paused"  # stopped by the user, goes on with resume
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_S = JobStatus
FINAL = frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED})
_ENDS = {_S.FAILED, _S.CANCELLED}
TRANSITIONS: dict[JobStatus, frozenset[JobStatus]] = {
    _S.VALIDATING_FILES: frozenset({_S.QUEUED, _S.PAUSED, *_ENDS}),
    _S.QUEUED: frozenset({_S.RUNNING, _S.PAUSED, *_ENDS}),
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.PAUSED, _S.QUEUED, *_ENDS}),
    _S.PAUSED: frozenset({_S.QUEUED, *_ENDS}),
    _S.SUCCEEDED: frozenset(),
    _S.FAILED: frozenset(),
    _S.CANCELLED: frozenset(),
}


def may_become(old: JobStatus, new: JobStatus) -> bool:
    """Whether a job may go from one state to the other."""
    return new in TRANSITIONS[old]
