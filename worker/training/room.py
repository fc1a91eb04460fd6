"""How many tokens one pass may hold: what is fast on the device, or less where its memory asks for less.

The answer depends on the job, the device and its memory, not on what happens to be free on a CPU, so that an
attempt elsewhere on such a machine computes the same bits. The maths is in `app/core/memory.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import nlargest
from pathlib import Path

import torch

from app.core.memory import MOST_TOKENS, Device, Method, Workload
from app.core.shapes import read_shape
from worker.base_model import memory_of
from worker.chat_template import TokenizedExample
from worker.training.data import label_count
from worker.training.plan import Plan
from worker.training.rows import rows_of

LOOKED_AT = 1024  # the longest examples, which decide


def tokens_a_pass(plan: Plan, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens of one pass of this job; an example with more is a pass of its own."""
    spec = plan.spec
    shape = read_shape(Path(spec.base_model_dir))
    if shape is None:
        return MOST_TOKENS[device.type]
    method = Method(str(spec.adapter), spec.rank, spec.dropout, spec.target_modules)
    rows = rows_of(_longest(plan.training.examples), shares=spec.dropout == 0.0)
    tokens = plan.training.tokens + plan.validation.tokens
    work = Workload(shape, method, rows, spec.batch_size, tokens)
    return work.tokens_a_pass(Device(device.type, dtype.itemsize, _room(device)))


def _longest(examples: Sequence[TokenizedExample]) -> list[tuple[list[int], int]]:
    found = nlargest(LOOKED_AT, examples, key=lambda example: len(example.ids))
    return [(example.ids, label_count([example])) for example in found]


def _room(device: torch.device) -> int | None:
    """All that a CPU's process may have; of a GPU what other processes leave."""
    if device.type != "cuda":
        return memory_of(device)
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))
