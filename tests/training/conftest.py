"""A tiny model and specs over it, shared by the tests of the training engine."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from tests.tiny import build_tiny_model, write_examples
from worker.training.model import WarmBase
from worker.training.words import TrainSpec, TrainWord, Working

CPU = torch.device("cpu")
T = TypeVar("T")


def result(generator: Generator[Any, None, T]) -> T:
    """What a generator returns, whatever it said before."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def told(words: Iterable[TrainWord]) -> list[TrainWord]:
    """What was said, without the signs of life."""
    return [word for word in words if not isinstance(word, Working)]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests run side by side


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def warm() -> WarmBase:
    """Full precision, so that results can be compared to the last digits on every machine."""
    return WarmBase(CPU, torch.float32)


@pytest.fixture
def make_spec(tiny_dir: Path, tmp_path: Path) -> Callable[..., TrainSpec]:
    def make(**changes: Any) -> TrainSpec:
        training_file = write_examples(tmp_path / "train.jsonl", 11)
        fields: dict[str, Any] = {
            "job_id": "ftjob-test",
            "attempt": 1,
            "base_model_dir": str(tiny_dir),
            "training_file": str(training_file),
            "output_dir": str(tmp_path / "attempt"),
            "n_epochs": 2,
            "batch_size": 4,
            "rank": 4,
            "alpha": 8.0,
            "learning_rate": 1e-2,
        }
        return TrainSpec(**(fields | changes))

    return make
