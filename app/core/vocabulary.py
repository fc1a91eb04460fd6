"""OpenAI's closed lists of words, as stored and as sent. The states of a job stand in status.py."""

from __future__ import annotations

from enum import StrEnum


class Purpose(StrEnum):
    """What a file is for. Results are written by jobs, never uploaded."""

    FINE_TUNE = "fine-tune"
    BATCH = "batch"
    USER_DATA = "user_data"
    ASSISTANTS = "assistants"
    VISION = "vision"
    EVALS = "evals"
    FINE_TUNE_RESULTS = "fine-tune-results"


UPLOADABLE = tuple(purpose for purpose in Purpose if purpose is not Purpose.FINE_TUNE_RESULTS)


class FileStatus(StrEnum):
    """States of a file. A row exists only once its bytes are whole."""

    UPLOADED = "uploaded"
    PROCESSED = "processed"
    ERROR = "error"


class EventLevel(StrEnum):
    """How much an event matters."""

    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class EventType(StrEnum):
    """What an event carries: words alone, or numbers of a step."""

    MESSAGE = "message"
    METRICS = "metrics"
