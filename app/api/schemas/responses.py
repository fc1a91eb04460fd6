"""What a client asks of a response, and what of it this version does. Items and tools are read elsewhere.

Three kinds of fields, as in chat: done, harmless to ignore, and refused by name.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas.fields import Body, Id, Metadata, Name
from app.api.schemas.lists import ListItem, OrderedQuery
from app.api.schemas.sampling import LEAVE_OUT, LuthierOptions, Unsupported, refuse_by_name
from app.core.completions import Sampling
from app.core.errors import InvalidRequest

LOGPROBS = "message.output_text.logprobs"
# The others ask for parts of items that only built-in tools, images or reasoning make.
Includable = Literal[
    "message.output_text.logprobs",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]


class TextOptions(Body):
    """How the text shall be. `verbosity` is accepted without a meaning."""

    format: Any = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Body):
    """Only with `stream`. Obfuscation is accepted and not done: it hides sizes, not words."""

    include_obfuscation: bool | None = None


class CreateResponse(Body):
    """Body of POST /v1/responses."""

    # Done
    model: Name
    input: Any = None
    instructions: str | None = None
    previous_response_id: Id | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = Field(default=None, ge=16)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0, allow_inf_nan=False)
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[Includable] | None = None
    text: TextOptions | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    luthier: LuthierOptions | None = None

    # Accepted, without a meaning here
    reasoning: dict[str, Any] | None = None
    max_tool_calls: int | None = Field(default=None, ge=1)  # of built-in tools, of which there are none
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=128)
    service_tier: str | None = Field(default=None, max_length=64)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: str | None = Field(default=None, max_length=64)
    prompt_cache_options: dict[str, Any] | None = None

    # Refused, but at the value that asks for nothing
    background: bool | None = None
    background_options: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    conversation: Any = None
    prompt: Any = None
    context_management: Any = None
    moderation: Any = None
    image: Any = None
    access_programs: Any = None

    def refuse_unsupported(self) -> None:
        """Raise for every field whose value asks for something this version does not do."""
        refuse_by_name(self, _UNSUPPORTED)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed together with 'stream': true.",
                code="invalid_value",
                param="stream_options",
            )

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        wants_logprobs = LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        return Sampling(
            max_tokens=self.max_output_tokens,
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_logprobs=(self.top_logprobs or 0) if wants_logprobs else None,
            ignore_eos=bool(self.luthier and self.luthier.ignore_eos),
        )

    def frame(self, tools: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields of the response that repeat the request or never change."""
        text = self.text or TextOptions()
        return {
            "background": False,
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": self.store is not False,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": text.format or {"type": "text"}, "verbosity": text.verbosity},
            "tool_choice": self.tool_choice or "auto",
            "tools": tools,
            "top_logprobs": self.top_logprobs or 0,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": self.user,
            "metadata": self.metadata or {},
        }


_UNSUPPORTED: Unsupported = (
    ("background", (False,), LEAVE_OUT),
    ("background_options", (), LEAVE_OUT),
    ("truncation", ("disabled",), "Too long a conversation is refused, not cut."),
    ("conversation", (), "Use 'previous_response_id'."),
    ("prompt", (), "Use 'instructions' and 'input'."),
    ("context_management", ([],), LEAVE_OUT),
    ("moderation", (), LEAVE_OUT),
    ("image", (), LEAVE_OUT),
    ("access_programs", (), LEAVE_OUT),
)


class ResponseObject(BaseModel):
    """A response as it was answered."""

    model_config = ConfigDict(extra="allow")

    id: str


class ItemObject(ListItem):
    """An item that a response was made from."""

    model_config = ConfigDict(extra="allow")


class ResponseDeleted(BaseModel):
    """Confirmation that a stored response is gone."""

    id: str
    object: Literal["response.deleted"] = "response.deleted"
    deleted: bool = True


class ResponseQuery(BaseModel):
    """A stored response is read whole."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include: list[Includable] | None = Field(default=None, alias="include[]")
    stream: bool | None = None
    starting_after: int | None = None
    include_obfuscation: bool | None = None

    def refuse_unsupported(self) -> None:
        """Raise for what would read it as a stream."""
        for field in ("stream", "starting_after"):
            if getattr(self, field) not in (None, False):
                raise InvalidRequest(
                    f"'{field}' is not supported here: a stored response is read whole. {LEAVE_OUT}",
                    code="unsupported_parameter",
                    param=field,
                )


class ItemsQuery(OrderedQuery):
    """Newest first unless said otherwise, as at OpenAI."""

    order: Literal["asc", "desc"] = "desc"
    include: list[Includable] | None = Field(default=None, alias="include[]")
