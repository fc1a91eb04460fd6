"""What a job will take: memory, tokens, steps, seconds, cost; and whether any worker has room for it.

Made where its files are checked, before it is queued. The maths of memory is in `app/core/memory.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import redis

from app.core.base_models import find_model_dir
from app.core.failures import FailureCode
from app.core.hyperparameters import Hyperparameters
from app.core.memory import Device, Method, Workload
from app.core.presence import list_present
from app.core.shapes import read_shape
from app.core.tables import Job
from app.core.waiting import expected_seconds
from worker.context import Context
from worker.inputs import JobInputError
from worker.token_counts import Counted, count_tokens, find_counter
from worker.validation import CheckedFile

log = logging.getLogger(__name__)
SHORTEST = 64  # tokens; no smaller luthier.max_length is advised


def estimate(
    context: Context, job: Job, numbers: Hyperparameters, files: Sequence[CheckedFile]
) -> dict[str, Any]:
    """The job's `luthier.estimate`; what cannot be told is None. `files`: training first, then validation.

    Raises JobInputError when no living worker has room for the job.
    """
    steps = numbers.n_epochs * math.ceil(files[0].examples / numbers.batch_size)
    counted = _count(context, job, files)
    peak, kind = None, None
    work = _workload(context, job, numbers, counted) if counted else None
    if work is not None:
        device = _best(_devices(context, job), work)
        peak, kind = work.peak_bytes(device), device.kind
    seconds = _seconds(context, job, numbers, files[0])
    price = context.settings.price_per_gpu_hour
    return {
        "memory_bytes": peak,
        "device": kind,
        "trained_tokens": counted[0].tokens * numbers.n_epochs if counted else None,
        "steps": steps,
        "seconds": None if seconds is None else round(seconds, 1),
        "cost": None if seconds is None or price is None else round(seconds / 3600 * price, 4),
    }


def _count(context: Context, job: Job, files: Sequence[CheckedFile]) -> list[Counted] | None:
    entry = context.catalogue.find(job.base_model)
    folder = None if entry is None else find_model_dir(entry, context.settings.models_dir)
    counter = None if entry is None or folder is None else find_counter(folder, entry.chat_template)
    if counter is None:
        return None
    found = [
        count_tokens(
            file.path,
            file.line_bytes,
            counter=counter,
            max_length=job.luthier["max_length"],
            shares=not job.luthier["dropout"],
        )
        for file in files
    ]
    counted = [one for one in found if one is not None]
    return counted if len(counted) == len(files) else None


def _workload(
    context: Context, job: Job, numbers: Hyperparameters, counted: Sequence[Counted]
) -> Workload | None:
    entry = context.catalogue.find(job.base_model)
    folder = None if entry is None else find_model_dir(entry, context.settings.models_dir)
    shape = None if folder is None else read_shape(folder)
    if shape is None:
        return None
    options = job.luthier
    method = Method(
        options["adapter"],
        rank=options["rank"] or 0,
        dropout=options["dropout"] or 0.0,
        target_modules=tuple(options["target_modules"] or ()),
    )
    return Workload(
        shape,
        method,
        rows=counted[0].rows,  # a validation pass keeps nothing for a way back
        batch_size=numbers.batch_size,
        file_tokens=sum(one.tokens for one in counted),
    )


def _devices(context: Context, job: Job) -> list[Device]:
    """Those of the living training workers that have the base model."""
    try:
        present = list_present(context.redis, kind="training")
    except redis.RedisError:
        return []
    return [
        Device(worker["device"], worker["number_bytes"], worker.get("memory_bytes"))
        for worker in present
        if job.base_model in worker["base_models"] and worker.get("device") in ("cpu", "cuda")
    ]


def _best(devices: Sequence[Device], work: Workload) -> Device:
    """The device with most memory; raises JobInputError when the job has no room on any."""
    if not devices:
        return Device()
    best = max(devices, key=lambda device: device.memory_bytes or math.inf)
    if any(work.fits(device) for device in devices):
        return best
    need, room = _shown(work.least_bytes(best)), _shown(best.memory_bytes or 0)
    text = f"The job needs about {need} of memory, and the training worker with most has {room}. "
    param, advice = _advice(best, work)
    raise JobInputError(code=FailureCode.OUT_OF_MEMORY, message=text + advice, param=param)


def _advice(device: Device, work: Workload) -> tuple[str, str]:
    """The setting that would fit, as the field and a sentence."""
    for param, said, changed in _smaller(work):
        if changed.fits(device):
            return param, f"With {said} it needs about {_shown(changed.least_bytes(device))}."
    return "model", "No setting makes it fit; choose a smaller base model, or ask for a larger worker."


def _smaller(work: Workload) -> Iterator[tuple[str, str, Workload]]:
    """What a user can change, the least loss first."""
    method = work.method
    frugal = replace(work, method=Method("qlora", rank=method.rank or 16))
    if method.adapter != "qlora":
        yield "luthier.adapter", "luthier.adapter 'qlora'", frugal
    both = "" if method.adapter == "qlora" else "luthier.adapter 'qlora' and "
    for start, said in ((work, ""), (frugal, both)):
        longest = max(row.tokens for row in work.rows)
        length = 2 ** (longest - 1).bit_length() // 2
        while length >= SHORTEST:
            yield "luthier.max_length", f"{said}luthier.max_length {length}", start.cut(length)
            length //= 2
    rank = method.rank // 2
    while method.adapter != "full" and rank >= 1:
        yield "luthier.rank", f"luthier.rank {rank}", replace(work, method=replace(method, rank=rank))
        rank //= 2


def _seconds(context: Context, job: Job, numbers: Hyperparameters, file: CheckedFile) -> float | None:
    work = float(file.size_bytes * numbers.n_epochs)
    with context.sessions() as session:
        return expected_seconds(session, base_model=job.base_model, adapter=job.luthier["adapter"], work=work)


def _shown(size_bytes: int) -> str:
    unit, name = (10**9, "GB") if size_bytes >= 10**9 else (10**6, "MB")
    return f"{size_bytes / unit:.1f} {name}"
