"""Rules without a database: states, ids, hyperparameters, settings."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.core import hyperparameters
from app.core.ids import Prefix, new_id
from app.core.settings import Settings
from app.core.status import FINAL, TRANSITIONS, JobStatus, may_become

ALLOWED = {
    "validating_files": {"queued", "paused", "failed", "cancelled"},
    "queued": {"running", "paused", "failed", "cancelled"},
    "running": {"succeeded", "failed", "cancelled", "paused", "queued"},
    "paused": {"queued", "failed", "cancelled"},
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(JobStatus, JobStatus)))
def test_a_job_moves_only_along_the_table(old: JobStatus, new: JobStatus) -> None:
    allowed = new in ALLOWED.get(old, set())
    assert may_become(old, new) is allowed


def test_final_states_are_those_that_lead_nowhere() -> None:
    assert {status for status, targets in TRANSITIONS.items() if not targets} == FINAL
    assert set(TRANSITIONS) == set(JobStatus)


def test_ids_tell_their_kind_and_do_not_repeat() -> None:
    for prefix in Prefix:
        assert re.fullmatch(re.escape(prefix) + "[A-Za-z0-9]{24}", new_id(prefix))
    assert len({new_id(Prefix.JOB) for _ in range(1000)}) == 1000


@given(st.integers(1, 10**7))
def test_auto_gives_usable_numbers_for_every_size(n_examples: int) -> None:
    numbers = hyperparameters.resolve({}, n_examples=n_examples)
    assert 1 <= numbers.n_epochs <= 25
    assert 1 <= numbers.batch_size <= min(32, n_examples)
    assert numbers.batch_size.bit_count() == 1
    assert numbers.learning_rate_multiplier == 1.0


def test_auto_trains_longer_on_little_data_and_wider_on_much() -> None:
    sizes = [10, 33, 34, 1000, 8333, 20_000, 10**6]
    epochs = [hyperparameters.auto_n_epochs(size) for size in sizes]
    assert epochs == sorted(epochs, reverse=True)
    batches = [hyperparameters.auto_batch_size(size) for size in sizes]
    assert batches == sorted(batches)
    assert (batches[0], batches[-1]) == (1, 16)


def test_numbers_the_user_gave_stay_but_no_batch_exceeds_the_data() -> None:
    asked = {"n_epochs": 7, "batch_size": 256, "learning_rate_multiplier": 2}
    numbers = hyperparameters.resolve(asked, n_examples=10)
    assert numbers.as_json() == {"n_epochs": 7, "batch_size": 10, "learning_rate_multiplier": 2.0}


def test_factors_learn_faster_than_whole_weights() -> None:
    def rate(multiplier: float, adapter: str) -> float:
        return hyperparameters.learning_rate(multiplier, base_rate=1e-3, adapter=adapter)

    assert rate(1.0, "qlora") == rate(1.0, "lora") == 1e-3
    assert rate(2.0, "lora") == 2e-3
    assert 0 < rate(1.0, "full") < 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70_000},
        {"lease_s": 0},
        {"max_attempts": 0},
        {"storage_url": "s3://bucket"},
        {"min_examples": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(**wrong)  # type: ignore[arg-type]


def test_settings_come_from_the_environment_and_cannot_change(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LUTHIER_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("LUTHIER_INFERENCE_MODELS", "a, b,")
    settings = Settings()
    assert settings.storage_dir == tmp_path / "storage"
    assert settings.served_base_models == ("a", "b")
    assert Settings(storage_url="file:///srv/s").storage_dir == Path("/srv/s")
    with pytest.raises(ValidationError):
        settings.port = 1  # type: ignore[misc]
