"""What a client asks of a chat completion, and what of it this version does.

Three kinds of fields: done, harmless to ignore, and refused by name because ignoring them would give
a wrong answer. Messages and tools are checked by core.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.api.schemas.fields import Metadata
from app.api.schemas.sampling import LEAVE_OUT, SamplingFields, Unsupported, refuse_by_name
from app.core.errors import InvalidRequest


class CreateChatCompletion(SamplingFields):
    """Body of POST /v1/chat/completions."""

    # Done
    messages: list[Any] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    store: bool | None = None
    metadata: Metadata | None = None  # of the stored completion

    # Accepted, without a meaning here
    safety_identifier: str | None = Field(default=None, max_length=128)
    service_tier: str | None = Field(default=None, max_length=64)
    prompt_cache_key: str | None = Field(default=None, max_length=512)
    prompt_cache_retention: str | None = Field(default=None, max_length=64)
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    prediction: dict[str, Any] | None = None
    moderation: dict[str, Any] | None = None

    # Accepted at the value that asks for nothing
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
        refuse_by_name(self, _UNSUPPORTED)
        self.refuse_lone_stream_options()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest(
                "'top_logprobs' is only allowed together with 'logprobs': true.",
                code="invalid_value",
                param="top_logprobs",
            )


_UNSUPPORTED: Unsupported = (
    ("modalities", (["text"],), 'Only ["text"] is.'),
    ("audio", (), LEAVE_OUT),
    ("functions", (), "Use 'tools'."),
    ("function_call", (), "Use 'tool_choice'."),
    ("web_search_options", (), LEAVE_OUT),
)
