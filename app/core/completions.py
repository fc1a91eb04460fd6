"""Every word the API and the inference worker say to each other.

A request travels one way, words travel back: any number of `Delta`, one `Finished` per choice,
or one `Failed` for the whole request. Knows neither HTTP nor the model.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter


class Wire(BaseModel):
    """Plain data that crosses a process border."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FinishReason(StrEnum):
    """Why a choice ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"  # said by the API, which reads the calls out of the text


class WeightsKind(StrEnum):
    """What a tuned model adds to its base: low-rank factors, or a whole set of weights."""

    LORA = "lora"
    FULL = "full"


class TunedWeights(Wire):
    """Weights a request asks for beside the base model. `id` is unique and never reused."""

    id: str
    kind: WeightsKind
    path: str  # key in storage on the wire; for the engine a folder: PEFT's, or a whole model for `full`


class Sampling(Wire):
    """How tokens are chosen. `max_tokens` None means: up to the end of the context."""

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = Field(default_factory=dict)  # token id → added to its logit
    top_logprobs: int | None = None  # None: no log-probabilities; else how many besides the chosen token's
    ignore_eos: bool = False  # go on to `max_tokens` whatever the model says


class CompletionRequest(Wire):
    """One completion, ready to run: names resolved, rights checked, numbers bounded.

    Of a conversation, or of a plain `prompt` (text or token ids), in whose place no messages are read.
    """

    id: str
    project_id: str
    base_model: str  # catalogue name; the engine of that base answers
    tuned: TunedWeights | None = None
    messages: list[dict[str, Any]]
    prompt: str | tuple[int, ...] | None = None
    tools: list[dict[str, Any]] | None = None
    sampling: Sampling = Sampling()
    grammar: str | None = None  # what the answer may say, in llguidance's language; checked by the API
    reply_to: str  # channel of the API process that waits
    expires_at: float  # unix seconds; past it nobody waits for the first word any more


class Chance(Wire):
    """A token and its natural log-probability; `bytes` may be part of a character."""

    token: str
    bytes: tuple[int, ...]
    logprob: float


class TokenChance(Chance):
    """A token of the answer and the most likely ones at its place, in OpenAI's shape."""

    top_logprobs: tuple[Chance, ...]


class Delta(Wire):
    """New text of one choice, stop strings already taken out. Empty only where it brings `logprobs`."""

    word: Literal["delta"] = "delta"
    index: int
    text: str
    logprobs: tuple[TokenChance, ...] | None = None  # of the tokens that begin in this text


class Finished(Wire):
    """One choice is complete. Token counts are exact: what the model read and what it made."""

    word: Literal["finished"] = "finished"
    index: int
    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0  # of the prompt, not computed again


class Failed(Wire):
    """The whole request ended without an answer; `status` is the HTTP status it deserves."""

    word: Literal["failed"] = "failed"
    status: int
    code: str
    message: str
    param: str | None = None


Word = Annotated[Delta | Finished | Failed, Field(discriminator="word")]
WORDS: TypeAdapter[list[Word]] = TypeAdapter(list[Word])
