"""The official client, strict about every answer: what it sends is understood, what it gets fits."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from sqlalchemy.orm import Session, sessionmaker

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import Chance, Delta, Finished, FinishReason, TokenChance
from app.core.db import transaction
from app.core.settings import Settings
from app.core.status import JobStatus
from app.core.storage import Storage
from app.core.tables import Job
from tests.api.conftest import Tenant
from tests.api.servers import api_server
from tests.api.workers import InferenceWorker
from tests.factories import make_finished_job, make_job

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
LINE = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'


@pytest.fixture
def job(tenant: Tenant, sessions: sessionmaker[Session], storage: Storage) -> Job:
    """A job that ran to its end."""
    with transaction(sessions) as session:
        return make_finished_job(session, storage, project=tenant.project)


def test_a_file_goes_up_waits_comes_back_and_goes_away(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    path.write_bytes(LINE * 12)
    file = client.files.create(file=path, purpose="fine-tune")
    assert (file.filename, file.bytes, file.purpose) == ("training.jsonl", len(LINE) * 12, "fine-tune")
    assert client.files.wait_for_processing(file.id, poll_interval=0.01).status == "processed"
    assert client.files.retrieve(file.id) == file
    assert client.files.content(file.id).read() == LINE * 12
    assert [item.id for item in client.files.list(purpose="fine-tune")] == [file.id]
    assert client.files.delete(file.id).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.files.retrieve(file.id)
    assert (caught.value.code, caught.value.param) == (None, "id")


@pytest.mark.parametrize("purpose", ["assistants", "batch", "fine-tune", "vision", "user_data"])
def test_every_purpose_that_an_answer_can_carry_is_accepted(client: openai.OpenAI, purpose: Any) -> None:
    file = client.files.create(file=io.BytesIO(LINE), purpose=purpose)
    assert (file.purpose, file.filename) == (purpose, "upload")


def test_a_file_that_expires_says_when(client: openai.OpenAI) -> None:
    file = client.files.create(
        file=("a.jsonl", LINE, "application/jsonl"),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert file.expires_at == file.created_at + 7200


def test_a_job_is_created_found_and_cancelled(client: openai.OpenAI) -> None:
    file = client.files.create(file=LINE * 12, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=DEFAULT_BASE_MODEL,
        training_file=file.id,
        validation_file=file.id,
        suffix="support",
        seed=42,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        extra_body={"luthier": {"adapter": "lora", "rank": 4}},
    )
    assert (job.status, job.seed, job.hyperparameters.n_epochs) == ("validating_files", 42, 2)
    assert job.method is not None
    assert job.method.supervised is not None
    assert job.method.supervised.hyperparameters is not None
    assert job.method.supervised.hyperparameters.batch_size == "auto"
    assert job.model_extra is not None
    assert job.model_extra["luthier"]["rank"] == 4
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    assert [item.id for item in client.fine_tuning.jobs.list(metadata={"team": "a"})] == [job.id]
    assert list(client.fine_tuning.jobs.list(extra_query={"metadata": "null"})) == []
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_nones_of_the_client_mean_absent(client: openai.OpenAI) -> None:
    file = client.files.create(file=LINE, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=DEFAULT_BASE_MODEL,
        training_file=file.id,
        validation_file=None,
        suffix=None,
        seed=None,
        integrations=None,
        metadata=None,
    )
    assert job.seed >= 0


@pytest.mark.parametrize("status", [status for status in JobStatus if status is not JobStatus.PAUSED])
def test_a_job_in_any_state_fits_the_clients_types(
    client: openai.OpenAI, tenant: Tenant, sessions: sessionmaker[Session], status: JobStatus
) -> None:
    error = {"code": "invalid_training_file", "message": "Example 3 is bad", "param": "training_file"}
    failed = status is JobStatus.FAILED
    with transaction(sessions) as session:
        row = make_job(session, project=tenant.project, status=status, error=error if failed else None)
    job = client.fine_tuning.jobs.retrieve(row.id)
    assert job.status == status
    assert (job.error is None) is not failed
    if job.error:
        assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")


def test_a_finished_job_has_its_model_results_events_and_checkpoints(
    client: openai.OpenAI, job: Job, worker: InferenceWorker
) -> None:
    found = client.fine_tuning.jobs.retrieve(job.id)
    assert (found.status, found.trained_tokens, found.error) == ("succeeded", 51_200, None)
    assert found.hyperparameters.model_dump() == job.hyperparameters
    assert client.files.retrieve(found.result_files[0]).purpose == "fine-tune-results"
    events = list(client.fine_tuning.jobs.list_events(job.id))
    assert events[-1].message == f"Created fine-tuning job: {job.id}"
    assert {event.type for event in events} == {"message", "metrics"}
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id))
    assert [checkpoint.step_number for checkpoint in checkpoints] == [3, 2, 1]
    for checkpoint in checkpoints:
        name = checkpoint.fine_tuned_model_checkpoint
        assert client.models.retrieve(name).id == name
        assert client.chat.completions.create(model=name, messages=MESSAGES).model == name


def test_models_are_listed_retrieved_and_deleted(client: openai.OpenAI, job: Job) -> None:
    name = job.fine_tuned_model or ""
    assert "::" in name
    assert [model.id for model in client.models.list()] == [DEFAULT_BASE_MODEL, name]
    assert 0 <= client.models.retrieve(name).created - int(job.created_at.timestamp()) <= 5
    assert client.models.delete(name).deleted
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve(name)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("organization/model")


def test_chat_answers_whole_and_in_pieces(client: openai.OpenAI, worker: InferenceWorker) -> None:
    whole = client.chat.completions.create(model=DEFAULT_BASE_MODEL, messages=MESSAGES, n=2)
    assert [choice.message.content for choice in whole.choices] == ["Hello world"] * 2
    assert whole.choices[0].message.tool_calls is None
    assert whole.usage is not None
    assert whole.usage.total_tokens == 11
    stream = client.chat.completions.create(
        model=DEFAULT_BASE_MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Hello world"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2


def test_the_clients_stream_helper_joins_all_choices(client: openai.OpenAI, worker: InferenceWorker) -> None:
    with client.chat.completions.stream(model=DEFAULT_BASE_MODEL, messages=MESSAGES, n=3) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["Hello world"] * 3
    assert [choice.finish_reason for choice in final.choices] == ["stop"] * 3
    assert [choice.message.role for choice in final.choices] == ["assistant"] * 3


async def _ask(tenant: Tenant, url: str) -> tuple[str | None, str]:
    async with openai.AsyncOpenAI(
        api_key=tenant.secret, base_url=f"{url}/v1", _strict_response_validation=True
    ) as client:
        whole = await client.chat.completions.create(model=DEFAULT_BASE_MODEL, messages=MESSAGES)
        stream = await client.chat.completions.create(
            model=DEFAULT_BASE_MODEL, messages=MESSAGES, stream=True
        )
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(parts)


def test_the_asynchronous_client_gets_the_same(
    tenant: Tenant, server_url: str, worker: InferenceWorker
) -> None:
    assert asyncio.run(_ask(tenant, server_url)) == ("Hello world", "Hello world")


def test_every_list_read_one_by_one_is_the_list(
    client: openai.OpenAI, tenant: Tenant, sessions: sessionmaker[Session], job: Job
) -> None:
    for _ in range(3):
        client.files.create(file=LINE, purpose="batch")
        with transaction(sessions) as session:
            make_job(session, project=tenant.project)
    jobs = client.fine_tuning.jobs
    lists: dict[str, tuple[Callable[..., Iterable[Any]], dict[str, Any]]] = {
        "files": (client.files.list, {}),
        "files, oldest first": (client.files.list, {"order": "asc"}),
        "files of a purpose": (client.files.list, {"purpose": "batch"}),
        "jobs": (jobs.list, {}),
        "events": (jobs.list_events, {"fine_tuning_job_id": job.id}),
        "checkpoints": (jobs.checkpoints.list, {"fine_tuning_job_id": job.id}),
    }
    for name, (list_, arguments) in lists.items():
        whole = [item.id for item in list_(**arguments, limit=100)]
        assert len(whole) >= 3, name
        assert len(set(whole)) == len(whole)
        assert [item.id for item in list_(**arguments, limit=1)] == whole, name
        assert [item.id for item in list_(**arguments, limit=2)] == whole, name
    ascending = [item.id for item in client.files.list(order="asc")]
    assert ascending == [item.id for item in client.files.list()][::-1]


def _bad_key(client: openai.OpenAI) -> object:
    return client.with_options(api_key="sk-wrong").models.list()


def _bad_temperature(client: openai.OpenAI) -> object:
    return client.chat.completions.create(model=DEFAULT_BASE_MODEL, messages=MESSAGES, temperature=3)


ERRORS: dict[str, tuple[Callable[[openai.OpenAI], object], type[openai.APIStatusError], str, str | None]] = {
    "key": (_bad_key, openai.AuthenticationError, "invalid_api_key", None),
    "range": (_bad_temperature, openai.BadRequestError, "decimal_above_max_value", "temperature"),
    "job": (
        lambda client: client.fine_tuning.jobs.retrieve("ftjob-none"),
        openai.NotFoundError,
        "fine_tune_not_found",
        "fine_tune_id",
    ),
    "route": (
        lambda client: client.get("/realtime", cast_to=object),
        openai.NotFoundError,
        "unknown_url",
        None,
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_arrives_with_its_class_code_param_and_request_id(client: openai.OpenAI, case: str) -> None:
    call, kind, code, param = ERRORS[case]
    with pytest.raises(kind) as caught:
        call(client)
    assert type(caught.value) is kind
    assert (caught.value.code, caught.value.param) == (code, param)
    assert (caught.value.request_id or "").startswith("req_")


def test_without_a_worker_the_client_is_told_when_to_come_back(tenant: Tenant, settings: Settings) -> None:
    with (
        api_server(settings) as url,
        openai.OpenAI(api_key=tenant.secret, base_url=f"{url}/v1", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model=DEFAULT_BASE_MODEL, messages=MESSAGES)
    assert (caught.value.status_code, caught.value.code) == (503, "model_not_loaded")
    assert caught.value.response.headers["retry-after"] == "5"


def test_a_request_id_comes_with_every_object(client: openai.OpenAI) -> None:
    page = client.files.with_raw_response.list()
    assert page.headers["x-request-id"].startswith("req_")
    assert (client.files.create(file=LINE, purpose="batch")._request_id or "").startswith("req_")


def test_log_probabilities_fit_the_clients_types(client: openai.OpenAI, worker: InferenceWorker) -> None:
    top = Chance(token="Hi", bytes=(72, 105), logprob=-0.25)
    said = Delta(index=0, text="Hi", logprobs=(TokenChance(**top.model_dump(), top_logprobs=(top,)),))
    end = Finished(index=0, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=1)
    worker.script = lambda _: [[said, end]]
    asked: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "messages": MESSAGES, "logprobs": True}
    logprobs = client.chat.completions.create(**asked, top_logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert (logprobs.content[0].bytes, logprobs.content[0].top_logprobs[0].logprob) == ([72, 105], -0.25)
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0].logprobs
    assert streamed is not None
    assert streamed.content == logprobs.content
