"""Chat completions with `store`: kept whole or failed aloud, seen by their project alone."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session, sessionmaker

from app.core import stored_completions
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import Delta, Failed
from app.core.db import transaction
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.test_chat import BODY, PATH, chat, events
from tests.api.workers import InferenceWorker, says


def listed(tenant: Tenant, query: str = "") -> list[str]:
    answer = tenant.http.get(f"{PATH}?{query}")
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["data"]]


def test_a_stored_answer_is_found_as_it_was_given(tenant: Tenant, worker: InferenceWorker) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"z": 1, "a": 2}}}]
    given = chat(tenant, store=True, metadata={"team": "a"}, temperature=0.5, tools=tools, user="u").json()
    assert given["metadata"] == {"team": "a"}
    found = tenant.http.get(f"{PATH}/{given['id']}").json()
    assert found == given | {
        "temperature": 0.5,
        "top_p": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": None,
        "tools": tools,
        "tool_choice": None,
        "response_format": None,
        "input_user": "u",
    }
    assert list(found["tools"][0]["function"]["parameters"]) == ["z", "a"]
    page = tenant.http.get(PATH).json()
    assert (page["data"], page["first_id"], page["has_more"]) == ([found], given["id"], False)


def test_without_store_nothing_is_kept(tenant: Tenant, worker: InferenceWorker) -> None:
    for fields in ({}, {"store": False, "metadata": {"a": "b"}}, {"store": None}):
        assert "metadata" not in chat(tenant, **fields).json()
    assert listed(tenant) == []


def test_a_stream_is_stored_as_the_whole_answer_it_makes(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = says("Hello", " world")
    chunks = events(chat(tenant, store=True, stream=True, n=2))
    found = tenant.http.get(f"{PATH}/{chunks[0]['id']}").json()
    assert [choice["message"]["content"] for choice in found["choices"]] == ["Hello world"] * 2
    assert (found["object"], found["created"]) == ("chat.completion", chunks[0]["created"])
    assert found["usage"]["completion_tokens"] == 4


def test_messages_are_listed_in_their_order_with_ids_of_their_own(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    parts = [{"type": "text", "text": "hi"}]
    messages = [{"role": "system", "content": "s", "name": "n"}, {"role": "user", "content": parts}]
    id = chat(tenant, store=True, messages=messages).json()["id"]
    path = f"{PATH}/{id}/messages"
    first, second = tenant.http.get(path).json()["data"]
    assert first == {"id": f"{id}-0", "role": "system", "content": "s", "name": "n", "content_parts": None}
    assert second == {"id": f"{id}-1", "role": "user", "content": None, "name": None, "content_parts": parts}
    assert tenant.http.get(f"{path}?order=desc&limit=1").json()["data"] == [second]
    assert tenant.http.get(f"{path}?after={id}-0").json()["data"] == [second]
    assert_refused(tenant.http.get(f"{path}?after=x"), 400, code=None, param="after")


def test_lists_filter_by_model_and_metadata_and_go_either_way(
    tenant: Tenant, worker: InferenceWorker
) -> None:
    metadata: list[dict[str, str]] = [{"a": "1"}, {"a": "1", "b": "2"}, {}]
    ids = [chat(tenant, store=True, metadata=pairs).json()["id"] for pairs in metadata]
    assert listed(tenant) == ids
    assert listed(tenant, "order=desc") == ids[::-1]
    assert listed(tenant, "metadata[a]=1") == ids[:2]
    assert listed(tenant, "metadata[a]=1&metadata[b]=2") == ids[1:2]
    assert listed(tenant, "metadata=null") == ids[2:]
    assert listed(tenant, f"model={DEFAULT_BASE_MODEL}&limit=2&after={ids[0]}") == ids[1:]
    assert listed(tenant, "model=other") == []
    assert_refused(tenant.http.get(f"{PATH}?order=up"), 400, code="invalid_value", param="order")


def test_a_page_of_large_completions_is_shorter_and_the_next_one_goes_on(
    tenant: Tenant, worker: InferenceWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [chat(tenant, store=True).json()["id"] for _ in range(3)]
    monkeypatch.setattr(stored_completions, "MAX_PAGE_BYTES", 1)
    after = ""
    for number, id in enumerate(ids):
        page = tenant.http.get(f"{PATH}?{after}").json()
        assert ([item["id"] for item in page["data"]], page["has_more"]) == ([id], number < 2)
        after = f"after={id}"


def test_metadata_is_replaced_or_cleared(tenant: Tenant, worker: InferenceWorker) -> None:
    path = f"{PATH}/{chat(tenant, store=True, metadata={'a': 'b'}).json()['id']}"
    for metadata in ({"c": "d"}, None):
        assert tenant.http.post(path, json={"metadata": metadata}).json()["metadata"] == (metadata or {})
        assert tenant.http.get(path).json()["metadata"] == (metadata or {})
    missing = tenant.http.post(path, json={})
    assert_refused(missing, 400, code="missing_required_parameter", param="metadata")


def test_another_project_sees_changes_and_deletes_nothing(
    tenant: Tenant, neighbour: Tenant, worker: InferenceWorker
) -> None:
    id = chat(tenant, store=True).json()["id"]
    path = f"{PATH}/{id}"
    assert listed(neighbour) == []
    assert_refused(neighbour.http.get(f"{PATH}?after={id}"), 400, code=None, param="after")
    for answer in (
        neighbour.http.get(path),
        neighbour.http.get(f"{path}/messages"),
        neighbour.http.post(path, json={"metadata": None}),
        neighbour.http.delete(path),
    ):
        assert_refused(answer, 404, code=None, param="completion_id")
    assert listed(tenant) == [id]


def test_what_is_deleted_is_gone(
    tenant: Tenant, worker: InferenceWorker, sessions: sessionmaker[Session]
) -> None:
    id = chat(tenant, store=True).json()["id"]
    gone = tenant.http.delete(f"{PATH}/{id}").json()
    assert gone == {"id": id, "object": "chat.completion.deleted", "deleted": True}
    assert_refused(tenant.http.delete(f"{PATH}/{id}"), 404, code=None, param="completion_id")
    with sessions() as session:
        assert session.scalar(text("SELECT count(*) FROM stored_completions")) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_cannot_be_stored_fails_aloud(
    tenant: Tenant, worker: InferenceWorker, sessions: sessionmaker[Session], stream: bool
) -> None:
    with transaction(sessions) as session:
        session.execute(text("LOCK TABLE stored_completions"))
        answer = chat(tenant, store=True, stream=stream)
    if stream:
        last: Any = answer.text.split("\n\n")[-2]
        assert "could not be stored" in last
        assert "[DONE]" not in answer.text
    else:
        assert_refused(answer, 503, code="service_unavailable", says="could not be stored")
        assert int(answer.headers["retry-after"]) > 0
    assert listed(tenant) == []


def test_an_answer_that_fails_in_the_middle_is_not_stored(tenant: Tenant, worker: InferenceWorker) -> None:
    failed = Failed(status=503, code="engine_stopped", message="The worker was stopped.")
    worker.script = lambda _: [[Delta(index=0, text="Hel")], [failed]]
    assert "engine_stopped" in chat(tenant, store=True, stream=True).text
    assert_refused(chat(tenant, store=True), 503, code="engine_stopped")
    assert listed(tenant) == []


def test_an_answer_whose_client_left_is_not_stored(tenant: Tenant, worker: InferenceWorker) -> None:
    worker.script = lambda _: says("Hello")(_)[:1]
    with tenant.http.stream("POST", PATH, json=BODY | {"store": True, "stream": True}) as answer:
        assert next(answer.iter_lines()).startswith("data: ")
    assert listed(tenant) == []
