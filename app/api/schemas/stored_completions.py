"""Stored chat completions as they leave, and what is asked of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from app.api.schemas.chat import CreateChatCompletion
from app.api.schemas.fields import Body, Metadata, Name
from app.api.schemas.lists import ListItem, MetadataQuery, OrderedQuery
from app.core.stored_completions import NewCompletion, Wanted
from app.core.tables import StoredCompletion

# Options of a request that its stored completion shows, as at OpenAI.
_SHOWN = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")
_SHOWN_AS_ASKED = ("tools", "tool_choice", "response_format")


class StoredObject(ListItem):
    """A completion as it was answered, with options of its request."""

    model_config = ConfigDict(extra="allow")


class StoredMessage(ListItem):
    """A message of a stored completion's request: text in `content`, a list of parts in `content_parts`."""

    model_config = ConfigDict(extra="allow")


class StoredDeleted(BaseModel):
    """Confirmation that a stored completion is gone."""

    id: str
    object: Literal["chat.completion.deleted"] = "chat.completion.deleted"
    deleted: bool = True


class ChangeCompletion(Body):
    """Body of POST /v1/chat/completions/{id}: null or nothing in it removes the metadata."""

    metadata: Metadata | None


class CompletionsQuery(MetadataQuery, OrderedQuery):
    """Completions of a model, with pairs of metadata or without any."""

    model: Name | None = None

    def wanted(self) -> Wanted:
        """As core knows it."""
        return Wanted(self.model, self.pairs, self.without)


def new_completion(body: CreateChatCompletion, response: dict[str, Any]) -> NewCompletion:
    """What is kept of a request and its answer."""
    sampling = body.sampling()
    options = {name: sampling[name] for name in _SHOWN}
    options |= {name: getattr(body, name) for name in _SHOWN_AS_ASKED}
    options["input_user"] = body.user
    whole = {key: value for key, value in response.items() if key != "metadata"}
    return NewCompletion({"messages": body.messages, "options": options}, whole, body.metadata)


def stored_object(row: StoredCompletion) -> StoredObject:
    """A row as the client sees it."""
    return StoredObject.model_validate(
        {**row.response, "metadata": row.user_metadata or {}, **row.request["options"]}
    )


def stored_messages(row: StoredCompletion) -> list[Mapping[str, Any]]:
    """The messages of the request, each with an id of its own."""
    return [_message(f"{row.id}-{i}", message) for i, message in enumerate(row.request["messages"])]


def _message(id: str, message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    said = {key: value for key, value in message.items() if value is not None}
    return {"id": id, "name": None, **said, "content": None if parts else content, "content_parts": parts}
