"""What a client asks of a chat completion, and what of it this version does.

Three kinds of fields: done, harmless to ignore, and refused by name because ignoring them would give
a wrong answer. Messages and tools are checked by core.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from app.api.faults import kind_of, shown
from app.api.schemas.fields import Body, Metadata, Name, fault
from app.core.errors import InvalidRequest

MAX_STOPS = 4
MAX_STOP_LENGTH = 1024  # characters; each is searched for in every new piece of text


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return None
    if not isinstance(stops, list):
        text = f"Invalid type for 'stop': expected a string or an array of strings, but got {kind_of(value)}."
        raise fault("invalid_type", text)
    if len(stops) > MAX_STOPS:
        text = f"Invalid 'stop': array too long. Expected at most {MAX_STOPS} items, but got {len(stops)}."
        raise fault("array_above_max_length", text)
    for stop in stops:
        if not isinstance(stop, str):
            raise fault("invalid_type", f"Invalid type in 'stop': expected strings, but got {kind_of(stop)}.")
        if not 0 < len(stop) <= MAX_STOP_LENGTH:
            text = f"Invalid value for 'stop': each string needs 1 to {MAX_STOP_LENGTH} characters."
            raise fault("invalid_value", text)
    return stops


class StreamOptions(Body):
    """Only with `stream`. Obfuscation is accepted and not done: it hides sizes, not words."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class CreateChatCompletion(Body):
    """Body of POST /v1/chat/completions."""

    # Done
    model: Name
    messages: list[Any] = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1)
    tools: Any = None
    tool_choice: Any = None

    # Accepted, without a meaning here
    user: str | None = Field(default=None, max_length=512)
    safety_identifier: str | None = Field(default=None, max_length=128)
    metadata: Metadata | None = None
    service_tier: str | None = Field(default=None, max_length=64)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: str | None = Field(default=None, max_length=64)
    prompt_cache_options: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    prediction: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    # Accepted at the value that asks for nothing
    store: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: dict[str, Any] | None = None
    response_format: Any = None
    modalities: list[Any] | None = None

    # Refused
    audio: Any = None
    functions: Any = None
    function_call: Any = None
    web_search_options: Any = None

    def limit(self) -> int | None:
        """Tokens each choice may have, under either of its names."""
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise InvalidRequest(
                "'max_tokens' and 'max_completion_tokens' differ. Give only the latter.",
                code="invalid_value",
                param="max_tokens",
            )
        return self.max_completion_tokens or self.max_tokens

    def refuse_unsupported(self) -> None:
        """Raise for every field whose value asks for something this version does not do."""
        for field, harmless, cure in _UNSUPPORTED:
            value = getattr(self, field)
            if value is not None and value not in harmless:
                raise InvalidRequest(
                    f"'{field}' with the value {shown(value, length=40)} is not supported here. {cure}",
                    code="unsupported_parameter",
                    param=field,
                )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed together with 'stream': true.",
                code="invalid_value",
                param="stream_options",
            )


_LEAVE_OUT = "Leave it out."
_UNSUPPORTED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("store", (False,), "Completions are not stored."),
    ("logprobs", (False,), _LEAVE_OUT),
    ("top_logprobs", (0,), _LEAVE_OUT),
    ("frequency_penalty", (0,), _LEAVE_OUT),
    ("presence_penalty", (0,), _LEAVE_OUT),
    ("logit_bias", ({},), _LEAVE_OUT),
    ("response_format", ({"type": "text"},), 'Only {"type": "text"} is; ask for the format in a message.'),
    ("modalities", (["text"],), 'Only ["text"] is.'),
    ("tool_choice", ("none", "auto"), "Only 'none' and 'auto' are."),
    ("audio", (), _LEAVE_OUT),
    ("functions", (), "Use 'tools'."),
    ("function_call", (), "Use 'tool_choice'."),
    ("web_search_options", (), _LEAVE_OUT),
)
