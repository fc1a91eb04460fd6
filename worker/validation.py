"""Reads a job's files before it may be queued: every line, once, without holding more than one."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from app.core import attempts
from app.core.dataset import DatasetError, read_examples, read_lines
from app.core.db import transaction
from app.core.tables import Job
from worker.context import Context
from worker.inputs import JobInputError, find_input

FRESH_S = 4.0  # how often a long validation says it is alive, so that nobody sends its hint again


@dataclass(frozen=True, slots=True)
class CheckedFile:
    """A file whose every line is good."""

    path: Path
    line_bytes: array[int]  # length of each line

    @property
    def examples(self) -> int:
        """How many it holds."""
        return len(self.line_bytes)

    @property
    def size_bytes(self) -> int:
        """Of all lines."""
        return sum(self.line_bytes)


def check_file(context: Context, job: Job, param: str) -> CheckedFile:
    """Read the file that `param` of the job names; raises JobInputError with the line that is wrong."""
    with context.sessions() as session:
        path = find_input(context, session, file_id=getattr(job, param), param=param)
    lengths, fresh_at = array("q"), time.monotonic()
    try:
        with path.open("rb") as file:
            lines = read_lines(file, max_line_bytes=context.settings.max_line_bytes)
            for _ in read_examples(_measured(lines, lengths)):
                if time.monotonic() - fresh_at > FRESH_S:
                    fresh_at = time.monotonic()
                    _stay_fresh(context, job.id)
    except DatasetError as error:
        text = f"The job failed due to an invalid {param.replace('_', ' ')}. {error.message}"
        raise JobInputError(code=f"invalid_{param}", message=text, param=param) from None
    _check_count(context, param, len(lengths))
    return CheckedFile(path, lengths)


def _measured(lines: Iterable[bytes], lengths: array[int]) -> Iterator[bytes]:
    for line in lines:
        lengths.append(len(line))
        yield line


def _check_count(context: Context, param: str, count: int) -> None:
    settings = context.settings
    least = settings.min_examples if param == "training_file" else 1
    name = param.replace("_", " ").capitalize()
    if count < least:
        text = f"{name} has {count} example(s), but must have at least {least} examples"
        raise JobInputError(code="invalid_n_examples", message=text, param=param)
    if count > settings.max_examples:
        text = f"{name} has {count} examples, but may have at most {settings.max_examples}"
        raise JobInputError(code="invalid_n_examples", message=text, param=param)


def _stay_fresh(context: Context, job_id: str) -> None:
    with transaction(context.sessions) as session:
        attempts.stay_fresh(session, job_id)
