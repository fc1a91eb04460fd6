"""Validation by the control worker: a good file queues its job, a bad one fails it in OpenAI's words."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from app.core.db import transaction, utc_now
from app.core.status import JobStatus
from app.core.tables import File
from app.core.vocabulary import EventLevel
from tests.worker.desk import Desk, examples
from worker import control

LINE = examples(1)


def validated(desk: Desk, data: bytes, validation: bytes | None = None) -> str:
    job_id = desk.create(data, validation_file=None if validation is None else desk.upload(validation))
    control.validate_job(desk.context, job_id)
    assert desk.context.sender.flush(timeout_s=20)
    return job_id


def test_a_good_file_queues_its_job_with_numbers_and_sends_a_hint(desk: Desk) -> None:
    job_id = validated(desk, examples(10), examples(1))
    job = desk.job(job_id)
    assert job.status is JobStatus.QUEUED
    assert job.error is None
    assert job.hyperparameters == {"n_epochs": 10, "batch_size": 1, "learning_rate_multiplier": 1.0}
    assert desk.words(job_id) == [
        f"Created fine-tuning job: {job_id}",
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        "Files validated, moving job to queued state",
    ]
    assert desk.context.redis.llen("training") == 1


def test_a_file_with_bom_crlf_and_blank_end_is_good(desk: Desk) -> None:
    data = b"\xef\xbb\xbf" + examples(10).replace(b"\n", b"\r\n") + b"\r\n\n"
    assert desk.job(validated(desk, data)).status is JobStatus.QUEUED


BAD = "The job failed due to an invalid training file. Invalid file format. "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LINE * 10 + b"nonsense", BAD + "Example 11 (line 11) is not valid JSON at character 1: "),
        (LINE * 3 + b"\xff" + LINE * 9, BAD + "Example 4 (line 4) is not valid UTF-8 at byte 1. "),
        (LINE * 3 + b"\n" + LINE * 9, BAD + "Line 4 is empty. Remove empty lines between examples"),
        (
            LINE * 99 + b'{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
            BAD + "Example 100, message 2 Discriminator 'role' is missing in value",
        ),
        (
            LINE * 10 + b'{"messages": [{"role": "user", "content": "a"}]}',
            BAD + "Example 11 has no assistant",
        ),
        (LINE * 10 + b'{"prompt": "a", "completion": "b"}', BAD + "Example 11 is a prompt/completion pair"),
        (LINE * 10 + b'{"messages": [], "a\\u0000b": 1}', BAD + "Example 11 has the unknown key 'a\ufffdb'"),
        (LINE * 10 + b'{"a": NaN}', BAD + "Example 11 (line 11) is refused: NaN is not JSON"),
        (b"[" * 100_000, BAD + "Example 1 (line 1) is nested deeper than 100 levels"),
        (b"a" * 5_000_000, BAD + "Line 1 is longer than 4194304 bytes"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value.removeprefix(BAD)[:30],
)
def test_a_bad_file_fails_its_job_with_the_place(desk: Desk, data: bytes, message: str) -> None:
    job_id = validated(desk, data)
    job = desk.job(job_id)
    assert job.status is JobStatus.FAILED
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_training_file", "training_file")
    assert job.error["message"].startswith(message)
    last = desk.events(job_id)[-1]
    assert last.level is EventLevel.ERROR
    assert last.message[:40] == job.error["message"][:40]
    assert job.finished_at is not None
    assert (job.fine_tuned_model, job.trained_tokens, job.result_file) == (None, None, None)
    assert job.hyperparameters["n_epochs"] == "auto"
    assert desk.context.redis.llen("training") == 0
    assert desk.leftovers() == []


@pytest.mark.parametrize(("data", "count"), [(examples(9), 9), (b"", 0)])
def test_too_few_examples_fail_in_openais_words(desk: Desk, data: bytes, count: int) -> None:
    job = desk.job(validated(desk, data))
    assert job.error == {
        "code": "invalid_n_examples",
        "message": f"Training file has {count} example(s), but must have at least 10 examples",
        "param": "training_file",
    }


def test_more_examples_than_allowed_fail(desk: Desk) -> None:
    job = desk.job(validated(desk.with_settings(max_examples=11), examples(12)))
    assert job.error is not None
    assert job.error["message"] == "Training file has 12 examples, but may have at most 11"


def test_a_bad_validation_file_is_named_as_such(desk: Desk) -> None:
    job = desk.job(validated(desk, examples(10), b"[]"))
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("invalid_validation_file", "validation_file")
    assert job.error["message"].startswith("The job failed due to an invalid validation file. ")
    empty = desk.job(validated(desk, examples(10), b""))
    assert empty.error is not None
    assert (empty.error["code"], empty.error["param"]) == ("invalid_n_examples", "validation_file")


@pytest.mark.parametrize("how", ["row", "bytes"])
def test_a_file_that_went_away_fails_the_job(desk: Desk, how: str) -> None:
    job_id = desk.create()
    file_id = desk.job(job_id).training_file
    if how == "bytes":
        desk.context.storage.delete(desk.file(file_id).storage_key)
    else:
        with transaction(desk.context.sessions) as session:
            session.scalars(select(File).where(File.id == file_id)).one().deleted_at = utc_now()
    control.validate_job(desk.context, job_id)
    job = desk.job(job_id)
    assert job.error is not None
    assert (job.error["code"], job.error["param"]) == ("file_not_found", "training_file")
    assert "Upload it again" in job.error["message"]


def test_a_cancelled_or_unknown_job_is_left_alone(desk: Desk) -> None:
    job_id = desk.create(b"nonsense")
    desk.cancel(job_id)
    before = desk.words(job_id)
    control.validate_job(desk.context, job_id)
    control.validate_job(desk.context, "ftjob-none")
    assert desk.job(job_id).status is JobStatus.CANCELLED
    assert desk.words(job_id) == before


def test_a_hint_delivered_twice_validates_once(desk: Desk) -> None:
    job_id = validated(desk, examples(10))
    control.validate_job(desk.context, job_id)
    assert desk.words(job_id).count("Files validated, moving job to queued state") == 1


def test_a_tool_conversation_is_accepted(desk: Desk) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "c"},
        {"role": "assistant", "content": "It is one.", "weight": 1},
    ]
    line = json.dumps({"messages": messages}).encode() + b"\n"
    assert desk.job(validated(desk, line * 10)).status is JobStatus.QUEUED
