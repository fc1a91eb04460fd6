"""The course of the learning rate, by its definition."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from tests.training.conftest import told
from worker.training.loop import train
from worker.training.model import WarmBase
from worker.training.schedule import learning_rate_at
from worker.training.words import Schedule, StepDone, TrainSpec

MakeSpec = Callable[..., TrainSpec]


def rates(spec: TrainSpec, steps: int = 100) -> list[float]:
    return [learning_rate_at(step, steps, spec) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", [Schedule.LINEAR, Schedule.COSINE])
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_nothing(
    make_spec: MakeSpec, kind: Schedule
) -> None:
    spec = make_spec(learning_rate=1.0, lr_scheduler_type=kind)
    course = rates(spec)
    assert max(course) == course[4] == 1.0
    assert course[:5] == sorted(course[:5])
    assert course[5:] == sorted(course[5:], reverse=True)
    assert 0 < course[-1] < 0.02
    assert learning_rate_at(1, 1, spec) == 1.0


def test_between_peak_and_end_a_line_a_cosine_or_nothing_changes(make_spec: MakeSpec) -> None:
    def at(kind: Schedule, step: int) -> float:
        return rates(make_spec(learning_rate=2.0, warmup_ratio=0.2, lr_scheduler_type=kind))[step - 1]

    for kind in Schedule:
        assert at(kind, 10) == pytest.approx(1.0)  # half of the warm-up
        assert at(kind, 20) == 2.0
    quarter = (40 - 20) / 81
    assert at(Schedule.LINEAR, 40) == pytest.approx(2.0 * (1 - quarter))
    assert at(Schedule.COSINE, 40) == pytest.approx(1.0 + math.cos(math.pi * quarter))
    assert at(Schedule.CONSTANT, 40) == at(Schedule.CONSTANT, 100) == 2.0


def test_without_warm_up_the_first_step_has_the_peak(make_spec: MakeSpec) -> None:
    assert rates(make_spec(learning_rate=3.0, warmup_ratio=0.0))[0] == 3.0


def test_a_run_follows_its_schedule_and_clips_where_asked(make_spec: MakeSpec, warm: WarmBase) -> None:
    changes = {"lr_scheduler_type": Schedule.CONSTANT, "warmup_ratio": 0.0}
    free = [word for word in told(train(make_spec(**changes), warm)) if isinstance(word, StepDone)]
    assert {word.learning_rate for word in free} == {1e-2}
    # Adam's first step does not depend on a gradient's length, unless that is no more than its epsilon.
    tight = make_spec(**changes, max_grad_norm=1e-9, output_dir=make_spec().output_dir + "-tight")
    clipped = [word for word in told(train(tight, warm)) if isinstance(word, StepDone)]
    assert clipped[0].metrics.train_loss == free[0].metrics.train_loss
    moved = [abs(words[1].metrics.train_loss - words[0].metrics.train_loss) for words in (free, clipped)]
    assert moved[1] < moved[0] / 5
