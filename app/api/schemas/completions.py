"""What a client asks of a plain completion, the API before chat, and what of it this version does."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from app.api.faults import kind_of, shown
from app.api.schemas.fields import fault
from app.api.schemas.sampling import SamplingFields
from app.core.errors import InvalidRequest

MAX_PROMPTS = 64
DEFAULT_MAX_TOKENS = 16  # OpenAI's
Prompt = str | tuple[int, ...]


def _prompts(value: object) -> object:
    """One text, one list of token ids, or a list of either; as a list of prompts."""
    if value is None or isinstance(value, str):
        return [value or ""]
    if not isinstance(value, list):
        text = f"Invalid type for 'prompt': expected a string or an array, but got {kind_of(value)}."
        raise fault("invalid_type", text)
    if not value:
        raise fault("empty_array", "Invalid 'prompt': empty array. Expected at least 1 item.")
    prompts = [value] if _is_id(value[0]) else value
    if len(prompts) > MAX_PROMPTS:
        text = f"Invalid 'prompt': array too long. Expected at most {MAX_PROMPTS} prompts."
        raise fault("array_above_max_length", text)
    return [_one(prompt) for prompt in prompts]


def _one(prompt: object) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(map(_is_id, prompt)):
        return tuple(prompt)
    text = "Invalid type in 'prompt': each prompt must be a string or an array of token ids."
    raise fault("invalid_type", text)


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class CreateCompletion(SamplingFields):
    """Body of POST /v1/completions."""

    prompt: Annotated[list[Any], BeforeValidator(_prompts, json_schema_input_type=Any)] = Field(
        default_factory=lambda: [""]
    )
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=5)
    best_of: int | None = Field(default=None, ge=0, le=20)

    # Refused, but at the value that asks for nothing
    suffix: str | None = None

    @property
    def made(self) -> int:
        """How many choices are made of each prompt; the `n` likeliest of them are the answer."""
        return self.best_of or self.n or 1

    def refuse_unsupported(self) -> None:
        """Raise for every field whose value asks for something this version does not do."""
        if self.suffix:
            raise _unsupported("suffix", self.suffix)
        if self.made < (self.n or 1):
            text = f"'best_of' must be at least 'n', but {self.made} is less than {self.n}."
            raise InvalidRequest(text, code="invalid_value", param="best_of")
        if self.stream and self.made > (self.n or 1):
            raise _unsupported("best_of", self.best_of, " together with 'stream'")
        if self.echo and self.logprobs is not None:
            raise _unsupported("echo", True, " together with 'logprobs'")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompt):
            raise _unsupported("echo", True, " with a prompt of token ids")
        self.refuse_lone_stream_options()


def _unsupported(field: str, value: object, why: str = "") -> InvalidRequest:
    text = f"'{field}' with the value {shown(value, length=40)} is not supported here{why}. Leave it out."
    return InvalidRequest(text, code="unsupported_parameter", param=field)
