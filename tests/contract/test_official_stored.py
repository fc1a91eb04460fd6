"""The official client over stored chat completions."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from app.core.base_models import DEFAULT_BASE_MODEL
from tests.api.conftest import Tenant
from tests.api.workers import InferenceWorker

ASKED: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}]}


def test_completions_are_stored_listed_changed_and_deleted(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    stored = client.chat.completions
    made = [stored.create(**ASKED, store=True, metadata={"run": str(i % 2)}).id for i in range(4)]
    with stored.stream(**ASKED, store=True) as stream:
        made.append(stream.get_final_completion().id)
    assert [item.id for item in stored.list(limit=2)] == made
    assert [item.id for item in stored.list(order="desc", limit=1)] == made[::-1]
    assert [item.id for item in stored.list(metadata={"run": "1"})] == [made[1], made[3]]
    found = stored.retrieve(made[0])
    assert (found.choices[0].message.content, found.metadata) == ("Hello world", {"run": "0"})
    assert stored.update(made[0], metadata={"seen": "yes"}).metadata == {"seen": "yes"}
    assert stored.update(made[0], metadata=None).metadata == {}
    assert stored.delete(made[0]).deleted
    with pytest.raises(openai.NotFoundError):
        stored.retrieve(made[0])
    assert [item.id for item in stored.list(model=DEFAULT_BASE_MODEL)] == made[1:]


def test_messages_of_a_stored_completion_are_listed(
    tenant: Tenant, server_url: str, worker: InferenceWorker
) -> None:
    asked = {**ASKED, "messages": [{"role": "system", "content": "s"}, *ASKED["messages"]]}
    # Not strict: the client's type of a message has the role "assistant" alone, which no service's have.
    with openai.OpenAI(api_key=tenant.secret, base_url=f"{server_url}/v1") as client:
        id = client.chat.completions.create(**asked, store=True).id
        list_ = client.chat.completions.messages.list
        messages = list(list_(id, limit=1))
        assert [(str(m.role), m.content) for m in messages] == [("system", "s"), ("user", "hi")]
        assert [m.id for m in messages] == [f"{id}-0", f"{id}-1"]
        assert [m.id for m in list_(id, order="desc")] == [f"{id}-1", f"{id}-0"]
