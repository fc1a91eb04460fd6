"""Chat through the real queue and the real reply stream, answered by a stand-in worker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from sqlalchemy.orm import Session, sessionmaker

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import (
    CompletionRequest,
    Delta,
    Failed,
    Finished,
    FinishReason,
    Word,
)
from app.core.db import transaction
from app.core.settings import Settings
from app.core.storage import Storage
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.servers import api_server, connect
from tests.api.workers import InferenceWorker, inference_worker, says
from tests.factories import make_finished_job
from tests.servers import valkey_server

PATH = "/v1/chat/completions"
BODY: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def chat(tenant: Tenant, **fields: Any) -> httpx.Response:
    """Ask, with these fields added."""
    return tenant.http.post(PATH, json=BODY | fields)


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """All events of a stream but the closing one, which must be there."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    *lines, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def wait_for(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def test_an_answer_is_whole_and_counts_its_tokens(tenant: Tenant, worker: InferenceWorker) -> None:
    answer = chat(tenant, n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert {choice["message"]["content"] for choice in answer["choices"]} == {"Hello world"}
    assert answer["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer["model"] == DEFAULT_BASE_MODEL
    assert "tool_calls" not in answer["choices"][0]["message"]


def test_a_request_reaches_the_worker_as_it_was_asked(tenant: Tenant, worker: InferenceWorker) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = chat(
        tenant,
        **{"temperature": 0, "top_p": 0.5, "max_completion_tokens": 9, "stop": "END", "seed": -3, "n": 2},
        **{"frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"7": -100}, "tools": tools},
        **{"logprobs": True, "top_logprobs": 3, "luthier": {"ignore_eos": True}},
    )
    assert answer.status_code == 200
    [request] = worker.requests
    assert request.sampling.model_dump() == {
        "max_tokens": 9,
        "temperature": 0.0,
        "top_p": 0.5,
        "stop": ("END",),
        "seed": -3,
        "n": 2,
        "frequency_penalty": 0.5,
        "presence_penalty": -1.0,
        "logit_bias": {7: -100.0},
        "top_logprobs": 3,
        "ignore_eos": True,
    }
    assert (request.tools, request.messages, request.tuned) == (tools, BODY["messages"], None)
    assert request.project_id == tenant.project.id
    assert 0 < request.expires_at - time.time() <= 5
    assert request.id == answer.json()["id"]


def test_nulls_mean_absent(tenant: Tenant, worker: InferenceWorker) -> None:
    optional = ["temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "n", "tools"]
    optional += ["stream", "stream_options", "user", "metadata", "logprobs", "response_format", "store"]
    assert chat(tenant, **dict.fromkeys(optional)).status_code == 200
    [request] = worker.requests
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.n) == (1.0, 1.0, 1)
    assert request.sampling.max_tokens is None


def test_harmless_fields_are_accepted(tenant: Tenant, worker: InferenceWorker) -> None:
    answer = chat(
        tenant,
        user="u",
        safety_identifier="s",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        prompt_cache_key="k",
        parallel_tool_calls=True,
        logprobs=False,
        frequency_penalty=0,
        presence_penalty=0.0,
        logit_bias={},
        response_format={"type": "text"},
        tool_choice="auto",
        modalities=["text"],
        reasoning_effort="low",
        verbosity="low",
    )
    assert answer.status_code == 200, answer.text


def test_with_tool_choice_none_no_tools_are_offered(tenant: Tenant, worker: InferenceWorker) -> None:
    chat(tenant, tools=TOOLS, tool_choice="none")
    assert worker.requests[0].tools is None


def test_a_tuned_model_answers_with_its_weights(
    tenant: Tenant, worker: InferenceWorker, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        name = make_finished_job(session, storage, project=tenant.project).fine_tuned_model
    assert chat(tenant, model=name).json()["model"] == name
    tuned = worker.requests[0].tuned
    assert tuned is not None
    assert tuned.path == f"weights/{tuned.id}"


def test_a_stream_says_role_text_and_end_of_each_choice_once(tenant: Tenant, worker: InferenceWorker) -> None:
    chunks = events(chat(tenant, stream=True, n=3))
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in choices[:3]] == [0, 1, 2]
    for index in range(3):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["delta"] for choice in mine] == [
            {"role": "assistant", "content": "", "refusal": None},
            {"content": "Hello"},
            {"content": " world"},
            {},
        ]
        assert [choice["finish_reason"] for choice in mine] == [None, None, None, "stop"]


def test_usage_comes_last_when_asked_for(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says("eins", "zwei", "drei", reason=FinishReason.LENGTH)
    chunks = events(chat(tenant, stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 3,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_words_leave_as_they_come(tenant: Tenant, worker: InferenceWorker) -> None:
    go_on = threading.Event()

    def slowly(request: CompletionRequest) -> list[list[Word]]:
        worker.answer(request, [Delta(index=0, text="first")])
        assert go_on.wait(5), "the first word did not reach the client"
        return [[_end()]]

    worker.script = slowly
    with tenant.http.stream("POST", PATH, json=BODY | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if '"first"' in line:
                go_on.set()
    assert go_on.is_set()


def test_text_of_any_kind_survives_the_stream(tenant: Tenant, worker: InferenceWorker) -> None:
    text = 'a\nb\r\n\n"data: [DONE]"\\ \u2028 \0 ünï 猫 🎈'
    worker.script = says(text)
    chunks = events(chat(tenant, stream=True))
    assert chunks[1]["choices"][0]["delta"]["content"] == text
    assert chat(tenant).json()["choices"][0]["message"]["content"] == text


def test_many_requests_at_once_each_get_their_own_words(tenant: Tenant, worker: InferenceWorker) -> None:
    def echo(request: CompletionRequest) -> Sequence[Sequence[Word]]:
        return says(request.messages[0]["content"], "!")(request)

    worker.script = echo
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        body = BODY | {"messages": [{"role": "user", "content": f"<{number}>"}], "stream": number % 2 == 0}
        answer = tenant.http.post(PATH, json=body)
        if number % 2:
            answers[number] = answer.json()["choices"][0]["message"]["content"]
        else:
            parts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in events(answer)]
            answers[number] = "".join(parts)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {number: f"<{number}>!" for number in range(24)}


def _end(index: int = 0) -> Finished:
    return Finished(index=index, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
def test_what_the_engine_refuses_is_a_status_before_any_word(
    tenant: Tenant, worker: InferenceWorker, stream: bool
) -> None:
    message = "This model's maximum context length is 8192 tokens."
    failed = Failed(status=400, code="context_length_exceeded", message=message, param="messages")
    worker.script = lambda _request: [[failed]]
    answer = chat(tenant, stream=stream)
    assert_refused(answer, 400, code="context_length_exceeded", param="messages", says="8192")


def test_an_engine_without_room_says_come_back(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = lambda _request: [[Failed(status=503, code="overloaded", message="All slots are taken.")]]
    answer = chat(tenant)
    assert_refused(answer, 503, code="overloaded")
    assert float(answer.headers["retry-after"]) > 0


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    failed = Failed(status=500, code="server_error", message="The engine had an error.")
    worker.script = lambda _request: [[Delta(index=0, text="so far")], [failed]]
    answer = chat(tenant, stream=True)
    assert answer.status_code == 200
    *_, last, rest = answer.text.split("\n\n")
    assert rest == ""
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error == {
        "message": "The engine had an error.",
        "type": "server_error",
        "param": None,
        "code": "server_error",
    }
    assert "so far" in answer.text
    assert_refused(chat(tenant), 500, code="server_error")


def test_silence_in_the_middle_ends_the_answer_and_frees_the_slot(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    worker.script = lambda _request: [[Delta(index=0, text="so far")]]
    assert_refused(chat(tenant), 503, code="engine_timeout", says="middle")
    wait_for(lambda: worker.cancels == [worker.requests[0].id])


def test_without_a_first_word_in_time_the_answer_is_to_come_back(
    tenant: Tenant, settings: Settings, worker: InferenceWorker
) -> None:
    worker.script = lambda _request: []
    hasty = settings.model_copy(update={"first_word_s": 0.3})
    headers = dict(tenant.http.headers)
    with api_server(hasty) as url, httpx.Client(base_url=url, headers=headers) as client:
        answer = client.post(PATH, json=BODY | {"stream": True})
    assert_refused(answer, 503, code="engine_timeout")
    assert answer.headers["retry-after"] == "5"
    wait_for(lambda: worker.cancels == [worker.requests[0].id])


def test_without_a_worker_the_answer_is_to_come_back(tenant: Tenant, settings: Settings) -> None:
    headers = dict(tenant.http.headers)
    with api_server(settings) as url, httpx.Client(base_url=url, headers=headers) as client:
        answer = client.post(PATH, json=BODY)
    assert_refused(answer, 503, code="model_not_loaded", says=DEFAULT_BASE_MODEL)
    assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(
    tenant: Tenant, server_url: str, worker: InferenceWorker, stream: bool
) -> None:
    worker.script = lambda _request: [[Delta(index=0, text="so far")]]
    body = json.dumps(BODY | {"stream": stream}).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {tenant.secret}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with connect(server_url) as connection:
        connection.sendall(head.encode() + body)
        wait_for(lambda: bool(worker.requests))
        time.sleep(0.1)
    wait_for(lambda: worker.cancels == [worker.requests[0].id], timeout_s=1.5)  # silence ends it after 2 s


def test_a_finished_answer_is_not_cancelled(tenant: Tenant, worker: InferenceWorker) -> None:
    for stream in (True, False):
        assert chat(tenant, stream=stream).status_code == 200
    time.sleep(0.2)
    assert worker.cancels == []


def test_a_lost_connection_to_the_broker_fails_what_is_in_flight_and_the_next_one_is_answered(
    tenant: Tenant, settings: Settings, tmp_path: Any
) -> None:
    headers = dict(tenant.http.headers)
    with (
        valkey_server(tmp_path / "valkey") as redis_url,
        api_server(settings.model_copy(update={"redis_url": redis_url, "word_gap_s": 60.0})) as url,
        httpx.Client(base_url=url, headers=headers, timeout=30) as client,
        inference_worker(redis_url) as worker,
        worker.present(),
    ):
        worker.script = lambda _request: [[Delta(index=0, text="so far")]]
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(client.post(PATH, json=BODY)))
        thread.start()
        wait_for(lambda: bool(worker.requests))
        time.sleep(0.2)
        [reader] = [entry for entry in worker.client.client_list() if entry["cmd"] == "xread"]
        worker.client.client_kill_filter(_id=reader["id"])
        thread.join(10)
        assert_refused(answers[0], 503, code="service_unavailable", says="lost")
        worker.script = says("Hello", " world")
        assert client.post(PATH, json=BODY).json()["usage"]["total_tokens"] == 9
