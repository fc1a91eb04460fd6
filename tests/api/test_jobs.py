"""Fine-tuning jobs over HTTP: what is echoed, what is refused, lists and their filters."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.db import transaction
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import File, Job
from app.core.vocabulary import Purpose
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.factories import make_file, make_finished_job, make_job

PATH = "/v1/fine_tuning/jobs"


@pytest.fixture
def file_id(tenant: Tenant, sessions: sessionmaker[Session], storage: Storage) -> str:
    """A training file of the tenant."""
    with transaction(sessions) as session:
        return make_file(session, storage, project=tenant.project).id


def create(tenant: Tenant, file_id: str, **fields: Any) -> httpx.Response:
    """Create a job with these fields added."""
    return tenant.http.post(PATH, json={"model": DEFAULT_BASE_MODEL, "training_file": file_id} | fields)


def test_a_new_job_echoes_what_was_asked_and_fills_in_the_rest(tenant: Tenant, file_id: str) -> None:
    asked = {"n_epochs": 3, "learning_rate_multiplier": 0.5}
    job = create(
        tenant,
        file_id,
        method={"type": "supervised", "supervised": {"hyperparameters": asked}},
        suffix="shop-1",
        seed=7,
        metadata={"team": "a"},
        luthier={"adapter": "lora", "rank": 8, "priority": 5},
        integrations=[],
    ).json()
    numbers = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    assert job["status"] == "validating_files"
    assert job["hyperparameters"] == numbers
    assert job["method"] == {"type": "supervised", "supervised": {"hyperparameters": numbers}}
    assert (job["seed"], job["metadata"], job["user_provided_suffix"]) == (7, {"team": "a"}, "shop-1")
    assert (job["error"], job["result_files"], job["fine_tuned_model"]) == (None, [], None)
    luthier = job["luthier"]
    assert (luthier["adapter"], luthier["rank"], luthier["alpha"], luthier["priority"]) == ("lora", 8, 16, 5)
    assert tenant.http.get(f"{PATH}/{job['id']}").json() == job


def test_the_older_place_of_hyperparameters_still_works(tenant: Tenant, file_id: str) -> None:
    asked = {"n_epochs": 2, "batch_size": "auto"}
    job = create(tenant, file_id, hyperparameters=asked).json()
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 2
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    assert create(tenant, file_id, hyperparameters=asked, method=method).status_code == 200
    method["supervised"] = {"hyperparameters": {"n_epochs": 3}}
    answer = create(tenant, file_id, hyperparameters=asked, method=method)
    assert_refused(answer, 400, code="invalid_value", param="hyperparameters", says="differ")


def test_nulls_mean_absent(tenant: Tenant, file_id: str) -> None:
    names = ["validation_file", "method", "hyperparameters", "suffix", "seed", "integrations", "metadata"]
    job = create(tenant, file_id, luthier={"rank": None}, **dict.fromkeys(names)).json()
    assert (job["luthier"]["rank"], job["metadata"]) == (16, None)
    assert 0 <= job["seed"] < 2**31


def supervised(**numbers: Any) -> dict[str, Any]:
    """A method with these hyperparameters."""
    return {"method": {"type": "supervised", "supervised": {"hyperparameters": numbers}}}


IN_METHOD = "method.supervised.hyperparameters"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no epochs": (supervised(n_epochs=0), "integer_below_min_value", f"{IN_METHOD}.n_epochs"),
    "51 epochs": (supervised(n_epochs=51), "integer_above_max_value", f"{IN_METHOD}.n_epochs"),
    "many epochs": (supervised(n_epochs="many"), "invalid_value", f"{IN_METHOD}.n_epochs"),
    "half an epoch": (supervised(n_epochs=1.5), "invalid_type", f"{IN_METHOD}.n_epochs"),
    "true epochs": (supervised(n_epochs=True), "invalid_type", f"{IN_METHOD}.n_epochs"),
    "no batch": (supervised(batch_size=0), "integer_below_min_value", f"{IN_METHOD}.batch_size"),
    "257 in a batch": (supervised(batch_size=257), "integer_above_max_value", f"{IN_METHOD}.batch_size"),
    "no rate": (
        supervised(learning_rate_multiplier=0),
        "decimal_below_min_value",
        f"{IN_METHOD}.learning_rate_multiplier",
    ),
    "a huge rate": (
        supervised(learning_rate_multiplier=1e300),
        "decimal_above_max_value",
        f"{IN_METHOD}.learning_rate_multiplier",
    ),
    "an unknown hyperparameter": (supervised(momentum=1), "unknown_parameter", f"{IN_METHOD}.momentum"),
    "epochs in the older place": (
        {"hyperparameters": {"n_epochs": 0}},
        "integer_below_min_value",
        "hyperparameters.n_epochs",
    ),
    "dpo": ({"method": {"type": "dpo", "dpo": {}}}, "invalid_value", "method.type"),
    "reinforcement": ({"method": {"type": "reinforcement"}}, "invalid_value", "method.type"),
    "dpo beside": ({"method": {"type": "supervised", "dpo": {}}}, "invalid_value", "method.dpo"),
    "no type": ({"method": {}}, "missing_required_parameter", "method.type"),
    "a suffix with slashes": ({"suffix": "a/b"}, "invalid_value", "suffix"),
    "a suffix with a colon": ({"suffix": "a:b"}, "invalid_value", "suffix"),
    "a suffix of two lines": ({"suffix": "a\n"}, "invalid_value", "suffix"),
    "an empty suffix": ({"suffix": ""}, "string_below_min_length", "suffix"),
    "a long suffix": ({"suffix": "a" * 65}, "string_above_max_length", "suffix"),
    "a negative seed": ({"seed": -1}, "integer_below_min_value", "seed"),
    "a large seed": ({"seed": 2**31}, "integer_above_max_value", "seed"),
    "17 metadata": ({"metadata": {str(i): "" for i in range(17)}}, "object_above_max_properties", "metadata"),
    "a long key": ({"metadata": {"a" * 65: ""}}, "string_above_max_length", "metadata"),
    "a long value": ({"metadata": {"a": "b" * 513}}, "string_above_max_length", "metadata"),
    "a number in metadata": ({"metadata": {"a": 1}}, "invalid_type", "metadata"),
    "NUL in metadata": ({"metadata": {"a": "\0"}}, "invalid_value", "metadata"),
    "metadata as a list": ({"metadata": []}, "invalid_type", "metadata"),
    "wandb": (
        {"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]},
        "invalid_value",
        "integrations[0].type",
    ),
    "an unknown field": ({"epochs": 3}, "unknown_parameter", "epochs"),
    "an unknown extension": ({"luthier": {"color": 1}}, "unknown_parameter", "luthier.color"),
    "an unknown adapter": ({"luthier": {"adapter": "magic"}}, "invalid_value", "luthier.adapter"),
    "rank 0": ({"luthier": {"rank": 0}}, "integer_below_min_value", "luthier.rank"),
    "rank 257": ({"luthier": {"rank": 257}}, "integer_above_max_value", "luthier.rank"),
    "alpha 0": ({"luthier": {"alpha": 0}}, "decimal_below_min_value", "luthier.alpha"),
    "dropout 1": ({"luthier": {"dropout": 1.0}}, "decimal_above_max_value", "luthier.dropout"),
    "65 modules": (
        {"luthier": {"target_modules": ["q"] * 65}},
        "array_above_max_length",
        "luthier.target_modules",
    ),
    "no modules": ({"luthier": {"target_modules": []}}, "empty_array", "luthier.target_modules"),
    "a module path": (
        {"luthier": {"target_modules": ["../x"]}},
        "invalid_value",
        "luthier.target_modules[0]",
    ),
    "short examples": ({"luthier": {"max_length": 15}}, "integer_below_min_value", "luthier.max_length"),
    "long examples": ({"luthier": {"max_length": 9000}}, "integer_above_max_value", "luthier.max_length"),
    "no interval": (
        {"luthier": {"checkpoint_interval": 0}},
        "integer_below_min_value",
        "luthier.checkpoint_interval",
    ),
    "priority": ({"luthier": {"priority": 101}}, "integer_above_max_value", "luthier.priority"),
    "an unknown model": ({"model": "gpt-9"}, "model_not_available", "model"),
    "no model": ({"model": None}, "invalid_type", "model"),
    "an unknown file": ({"training_file": "file-x"}, "invalid_value", "training_file"),
    "an unknown validation file": ({"validation_file": "file-x"}, "invalid_value", "validation_file"),
    "NUL in a name": ({"training_file": "a\0"}, "invalid_value", "training_file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_job_that_cannot_be_done_is_refused_by_name_and_leaves_nothing(
    tenant: Tenant, file_id: str, sessions: sessionmaker[Session], case: str
) -> None:
    fields, code, param = REFUSED[case]
    assert_refused(create(tenant, file_id, **fields), 400, code=code, param=param)
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


def test_a_file_of_another_purpose_is_refused(
    tenant: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        file = make_file(session, storage, project=tenant.project, purpose=Purpose.BATCH)
    answer = create(tenant, file.id)
    assert_refused(answer, 400, code="invalid_value", param="training_file", says="'fine-tune'")


def test_bad_data_is_no_reason_to_refuse(
    tenant: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        file = make_file(session, storage, project=tenant.project, data=b"\xff not JSON at all")
    assert create(tenant, file.id).json()["status"] == "validating_files"


def test_cancel_is_repeatable_but_not_for_what_has_ended(
    tenant: Tenant, sessions: sessionmaker[Session]
) -> None:
    with transaction(sessions) as session:
        running = make_job(session, project=tenant.project, status=JobStatus.RUNNING)
        ended = make_job(session, project=tenant.project, status=JobStatus.SUCCEEDED)
    first = tenant.http.post(f"{PATH}/{running.id}/cancel").json()
    assert first["status"] == "cancelled"
    assert first["finished_at"] is not None
    assert tenant.http.post(f"{PATH}/{running.id}/cancel").json() == first
    answer = tenant.http.post(f"{PATH}/{ended.id}/cancel")
    assert_refused(answer, 400, code="invalid_job_state", param="fine_tuning_job_id", says="succeeded")


def test_pause_and_resume_are_repeatable_but_not_for_what_has_ended(
    tenant: Tenant, sessions: sessionmaker[Session]
) -> None:
    with transaction(sessions) as session:
        waiting = make_job(session, project=tenant.project)
        running = make_job(session, project=tenant.project, status=JobStatus.RUNNING)
        ended = make_job(session, project=tenant.project, status=JobStatus.SUCCEEDED)
    for _ in range(2):
        assert tenant.http.post(f"{PATH}/{waiting.id}/pause").json()["status"] == "paused"
    for _ in range(2):
        assert tenant.http.post(f"{PATH}/{waiting.id}/resume").json()["status"] == "queued"
    for _ in range(2):
        job = tenant.http.post(f"{PATH}/{running.id}/pause").json()
        assert (job["status"], job["luthier"]["pausing"]) == ("running", True)
    job = tenant.http.post(f"{PATH}/{running.id}/resume").json()
    assert (job["status"], job["luthier"]["pausing"]) == ("running", False)
    for call in ("pause", "resume"):
        answer = tenant.http.post(f"{PATH}/{ended.id}/{call}")
        assert_refused(answer, 400, code="invalid_job_state", param="fine_tuning_job_id", says="succeeded")
        assert tenant.http.post(f"{PATH}/ftjob-unknown/{call}").status_code == 404


def test_a_job_that_waits_says_why_and_at_which_place(
    tenant: Tenant, sessions: sessionmaker[Session]
) -> None:
    with transaction(sessions) as session:
        jobs = [make_job(session, project=tenant.project) for _ in range(2)]
    listed = tenant.http.get(PATH).json()["data"]
    alone = tenant.http.get(f"{PATH}/{jobs[1].id}").json()["luthier"]
    assert [job["luthier"]["queue_position"] for job in listed] == [2, 1]
    assert alone == listed[0]["luthier"]
    assert alone["queued_reason"] == "No training worker is running; the job starts when one is back."
    assert (alone["estimated_start"], alone["estimated_finish"]) == (None, None)


def test_a_file_in_use_cannot_be_deleted_until_its_job_has_ended(
    tenant: Tenant, file_id: str, sessions: sessionmaker[Session], storage: Storage
) -> None:
    job = create(tenant, file_id).json()
    answer = tenant.http.delete(f"/v1/files/{file_id}")
    assert_refused(answer, 400, code="file_in_use", param="id", says=job["id"])
    tenant.http.post(f"{PATH}/{job['id']}/cancel")
    assert tenant.http.delete(f"/v1/files/{file_id}").json()["deleted"] is True
    assert tenant.http.get(f"/v1/files/{file_id}").status_code == 404
    with sessions() as session:
        assert not storage.path(session.get_one(File, file_id).storage_key).exists()
    assert_refused(create(tenant, file_id), 400, code="invalid_value", param="training_file")


def test_jobs_are_found_by_all_of_their_metadata_or_by_none(
    tenant: Tenant, sessions: sessionmaker[Session]
) -> None:
    with transaction(sessions) as session:
        both, one, none = (
            make_job(session, project=tenant.project, user_metadata=metadata).id
            for metadata in ({"a": "1", "b": "2"}, {"a": "1"}, None)
        )

    def found(query: str) -> set[str]:
        return {job["id"] for job in tenant.http.get(f"{PATH}?{query}").json()["data"]}

    assert found("metadata[a]=1") == {both, one}
    assert found("metadata%5Ba%5D=1&metadata%5Bb%5D=2") == {both}
    assert found("metadata[a]=2") == set()
    assert found("metadata=null") == {none}
    assert found("") == {both, one, none}
    for query in ("metadata=x", "metadata=null&metadata[a]=1", "metadata[a]=%00"):
        assert_refused(tenant.http.get(f"{PATH}?{query}"), 400, code="invalid_value", param="metadata")


def test_events_and_checkpoints_come_newest_first_with_their_own_defaults(
    tenant: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        job = make_finished_job(session, storage, project=tenant.project, n_checkpoints=25)
    events = tenant.http.get(f"{PATH}/{job.id}/events").json()
    assert (len(events["data"]), events["has_more"]) == (20, True)
    assert events["data"][0]["message"] == "The job has successfully completed"
    checkpoints = tenant.http.get(f"{PATH}/{job.id}/checkpoints").json()
    assert [item["step_number"] for item in checkpoints["data"]] == list(range(25, 15, -1))
    assert checkpoints["first_id"] == checkpoints["data"][0]["id"]
    assert checkpoints["last_id"] == checkpoints["data"][-1]["id"]


def test_a_model_in_use_cannot_be_deleted_and_a_base_model_never(
    tenant: Tenant, file_id: str, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        name = make_finished_job(session, storage, project=tenant.project).fine_tuned_model
    job = create(tenant, file_id, model=name).json()
    assert job["model"] == name
    answer = tenant.http.delete(f"/v1/models/{name}")
    assert_refused(answer, 400, code="model_in_use", param="model", says=job["id"])
    tenant.http.post(f"{PATH}/{job['id']}/cancel")
    assert tenant.http.delete(f"/v1/models/{name}").json() == {"id": name, "object": "model", "deleted": True}
    assert_refused(tenant.http.delete(f"/v1/models/{name}"), 404, code="model_not_found", param="model")
    answer = tenant.http.delete(f"/v1/models/{DEFAULT_BASE_MODEL}")
    assert_refused(answer, 400, code=None, param="model", says="base model")
