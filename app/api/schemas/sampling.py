"""What chat and the old completions ask alike: how tokens are chosen, when to stop, how to stream."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from app.api.faults import kind_of, shown
from app.api.schemas.fields import Body, Name, fault
from app.core.errors import InvalidRequest

LEAVE_OUT = "Leave it out."
Unsupported = tuple[tuple[str, tuple[Any, ...], str], ...]  # field, values that ask for nothing, cure
MAX_STOPS = 4
MAX_STOP_LENGTH = 1024  # characters; each is searched for in every new piece of text
MAX_BIASES = 1024  # tokens of one request; each is added to in every step


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


def _biases(value: object) -> object:
    """Token ids, strings in JSON, with what is added to their logits."""
    if value is None:
        return None
    if not isinstance(value, dict):
        text = f"Invalid type for 'logit_bias': expected an object, but got {kind_of(value)}."
        raise fault("invalid_type", text)
    if len(value) > MAX_BIASES:
        text = f"Invalid 'logit_bias': too many properties. Expected at most {MAX_BIASES}, got {len(value)}."
        raise fault("object_above_max_properties", text)
    return {_token_id(key): _bias(key, bias) for key, bias in value.items()}


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        text = f"Invalid key in 'logit_bias': {shown(key)!r}. Keys are token ids, such as \"50256\"."
        raise fault("invalid_value", text)
    return int(key)


def _bias(key: str, bias: object) -> float:
    if isinstance(bias, bool) or not isinstance(bias, int | float):
        raise fault("invalid_type", f"Invalid type for 'logit_bias.{shown(key)}': expected a number.")
    if not -100 <= bias <= 100:
        text = f"Invalid value for 'logit_bias.{shown(key)}': expected a number from -100 to 100."
        raise fault("invalid_value", text)
    return float(bias)


class StreamOptions(Body):
    """Only with `stream`. Obfuscation is accepted and not done: it hides sizes, not words."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class LuthierOptions(Body):
    """Our own extensions. `ignore_eos`: go on to `max_tokens` whatever the model says, for benchmarks."""

    ignore_eos: bool | None = None


class SamplingFields(Body):
    """Fields that chat and completions share."""

    model: Name
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0.0, le=2.0, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0, allow_inf_nan=False)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0, allow_inf_nan=False)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_biases)] = None
    user: str | None = Field(default=None, max_length=512)
    luthier: LuthierOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """A stream that ends with its token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def ignores_eos(self) -> bool:
        """The answer shall have all the tokens it may have."""
        return bool(self.luthier and self.luthier.ignore_eos)

    def refuse_lone_stream_options(self) -> None:
        """Raise when options of a stream come without one."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "'stream_options' is only allowed together with 'stream': true.",
                code="invalid_value",
                param="stream_options",
            )

    def sampling(self) -> dict[str, Any]:
        """The fields of `Sampling` that need no more checks."""
        return {
            "temperature": 1.0 if self.temperature is None else float(self.temperature),
            "top_p": 1.0 if self.top_p is None else float(self.top_p),
            "stop": tuple(self.stop or ()),
            "seed": self.seed,
            "n": self.n or 1,
            "frequency_penalty": float(self.frequency_penalty or 0),
            "presence_penalty": float(self.presence_penalty or 0),
            "logit_bias": self.logit_bias or {},
            "ignore_eos": self.ignores_eos,
        }


def refuse_by_name(body: Body, unsupported: Unsupported) -> None:
    """Raise for the first field whose value asks for something this version does not do."""
    for field, harmless, cure in unsupported:
        value = getattr(body, field)
        if value is not None and value not in harmless:
            raise InvalidRequest(
                f"'{field}' with the value {shown(value, length=40)} is not supported here. {cure}",
                code="unsupported_parameter",
                param=field,
            )
