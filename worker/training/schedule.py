"""The learning rate of each step. Pure."""

from __future__ import annotations

import math

from worker.training.words import Schedule, TrainSpec


def learning_rate_at(step: int, total_steps: int, spec: TrainSpec) -> float:
    """The rate of `step`, counted from 1: a linear warm-up, then what the schedule says.

    Linear decay (Defazio et al. 2023, "When, Why and How Much?") and cosine decay (Loshchilov and Hutter
    2017, "SGDR", equation 5, without restarts) would reach 0 one step past the end.
    """
    warmup = max(1, round(spec.warmup_ratio * total_steps))
    rising = step / warmup
    if rising < 1.0:
        return spec.learning_rate * rising
    falling = (total_steps + 1 - step) / (total_steps + 1 - warmup)
    match spec.lr_scheduler_type:
        case Schedule.LINEAR:
            share = falling
        case Schedule.COSINE:
            share = (1.0 - math.cos(math.pi * falling)) / 2
        case Schedule.CONSTANT:
            share = 1.0
    return spec.learning_rate * min(rising, share)
