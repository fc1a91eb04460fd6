"""What a job may be asked for beyond OpenAI's fields, and what its checkpoints say of themselves."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.orm.attributes import flag_modified

from app.core.db import transaction
from app.core.events import find_best_checkpoint
from app.core.storage import Storage
from app.core.tables import Checkpoint
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.test_jobs import PATH, create, file_id
from tests.factories import make_finished_job

__all__ = ["file_id"]  # the fixture

DEFAULTS = {
    "use_rslora": False,
    "lr_scheduler_type": "linear",
    "warmup_ratio": 0.05,
    "max_grad_norm": 1.0,
    "early_stopping_patience": None,
    "require_improvement": True,
    "base_full_valid_loss": None,
    "full_valid_loss": None,
}


def test_options_of_the_course_are_echoed_and_filled_in(tenant: Tenant, file_id: str) -> None:
    told = create(tenant, file_id).json()["luthier"]
    assert {name: told[name] for name in DEFAULTS} == DEFAULTS
    asked: dict[str, Any] = {
        "use_rslora": True,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.0,
        "max_grad_norm": 0.5,
        "early_stopping_patience": 2,
        "require_improvement": False,
    }
    told = create(tenant, file_id, validation_file=file_id, luthier=asked).json()["luthier"]
    assert {name: told[name] for name in asked} == asked
    full = {"adapter": "full", "lr_scheduler_type": "constant"}
    assert create(tenant, file_id, luthier=full).json()["luthier"]["use_rslora"] is None


@pytest.mark.parametrize(
    ("options", "code", "option"),
    [
        ({"lr_scheduler_type": "polynomial"}, "invalid_value", "lr_scheduler_type"),
        ({"warmup_ratio": 1.5}, "decimal_above_max_value", "warmup_ratio"),
        ({"max_grad_norm": 0}, "decimal_below_min_value", "max_grad_norm"),
        ({"early_stopping_patience": 0}, "integer_below_min_value", "early_stopping_patience"),
        ({"early_stopping_patience": 1}, "invalid_value", "early_stopping_patience"),  # no validation file
        ({"use_rslora": True, "adapter": "full"}, "invalid_value", "use_rslora"),
        ({"require_improvement": "x"}, "invalid_type", "require_improvement"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(
    tenant: Tenant, file_id: str, options: dict[str, Any], code: str, option: str
) -> None:
    answer = create(tenant, file_id, luthier=options)
    assert_refused(answer, 400, code=code, param=f"luthier.{option}")


def test_the_kept_checkpoint_with_the_lowest_validation_loss_says_so(
    tenant: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    losses = {1: 0.5, 2: 0.25, 3: None, 4: 0.25, 5: 10.0}
    with transaction(sessions) as session:
        job = make_finished_job(session, storage, project=tenant.project, n_checkpoints=5)
        assert find_best_checkpoint(session, job_id=job.id) is None
        for row in session.scalars(select(Checkpoint).where(Checkpoint.job_id == job.id)):
            row.metrics["full_valid_loss"] = losses[row.step_number]
            flag_modified(row, "metrics")

    def best() -> list[int]:
        told = tenant.http.get(f"{PATH}/{job.id}/checkpoints").json()["data"]
        assert len(told) >= 4
        return [item["step_number"] for item in told if item["luthier"]["best"]]

    assert best() == [2]
    name = next(
        item["fine_tuned_model_checkpoint"]
        for item in tenant.http.get(f"{PATH}/{job.id}/checkpoints").json()["data"]
        if item["step_number"] == 2
    )
    assert tenant.http.delete(f"/v1/models/{name}").is_success
    assert best() == [4]
