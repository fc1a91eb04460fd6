"""What is under way: one `Completion` per request, one `Sequence` per choice of it.

A sequence turns token ids into the words that leave the engine and decides when it is at its end. It knows
nothing of tensors, rows' memory or other requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from app.core.completions import CompletionRequest, Delta, Finished, FinishReason, Word
from worker.serving.adjustments import Adjustments, Grammar
from worker.serving.chances import ChanceStream, TokenBytes
from worker.serving.sampling import Chooser, make_chooser
from worker.serving.text import Decoder, TextStream

Emit = Callable[[list[Word]], None]
"""Takes new words of one request; called by the engine's thread, so it must return soon."""


@dataclass(eq=False)
class Completion:
    """One request whose prompt is known. `limit`: tokens each choice may have at most."""

    request: CompletionRequest
    prompt_ids: list[int]
    end_ids: frozenset[int]
    limit: int
    sequences: list[Sequence] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)  # of the current step, not yet handed out
    prompt_logits: Tensor | None = None  # 1V, of the prompt's last token, kept for the other choices
    cached_tokens: int = 0  # of the prompt, known from an earlier one
    broken: bool = False  # the model gave numbers that are not numbers
    started: bool = False  # a word has been handed out

    @property
    def expired(self) -> bool:
        """Nobody waits any more, because the first word did not come in time."""
        return not self.started and time.time() > self.request.expires_at

    @property
    def finished(self) -> bool:
        """All choices are complete."""
        return all(sequence.reason is not None for sequence in self.sequences)

    def take_words(self) -> list[Word]:
        """The words since the last call."""
        words, self.words = self.words, []
        self.started = self.started or bool(words)
        return words


class Sequence:
    """One choice: its ids so far, its random numbers, its text. `row` is its place in the running batch."""

    def __init__(
        self, completion: Completion, index: int, tokenizer: Decoder, *, tokens: TokenBytes | None = None
    ) -> None:
        sampling = completion.request.sampling
        self.completion = completion
        self.index = index
        self.ids = list(completion.prompt_ids)
        self.chooser: Chooser = make_chooser(
            sampling.temperature,
            sampling.top_p,
            seed=sampling.seed,
            index=index,
            adjustments=self._adjustments(),
        )
        self.chooser.top_logprobs = sampling.top_logprobs
        self.reason: FinishReason | None = None
        self.row: int | None = None
        self.adapter: str | None = None  # name under which the model knows the weights in use, while in a row
        self._text = TextStream(tokenizer, sampling.stop)
        asked = sampling.top_logprobs is not None
        self._chances = ChanceStream(tokens) if asked and tokens is not None else None

    @property
    def made_tokens(self) -> int:
        """Tokens generated so far; the end-of-turn token is not counted, as it carries no text."""
        return len(self.ids) - len(self.completion.prompt_ids)

    def constrain(self, grammar: Grammar) -> None:
        """Let the answer say only what the grammar allows; before its first token."""
        self.chooser.adjustments = self._adjustments(grammar)

    def accept(self, token_id: int) -> None:
        """Take the next token; append its words to the completion's."""
        if token_id in self.completion.end_ids:
            self._end(FinishReason.STOP, self._text.finish())
            return
        self.ids.append(token_id)
        if self._chances is not None and self.chooser.chances is not None:
            self._chances.push(token_id, self.chooser.chances)
        text = self._text.push(token_id)
        if not self._text.stopped and self.made_tokens >= self.completion.limit:
            text += self._text.finish()
            self._end(FinishReason.LENGTH, text)
        elif self._text.stopped:
            self._end(FinishReason.STOP, text)
        else:
            self._say(text)

    def _adjustments(self, grammar: Grammar | None = None) -> Adjustments | None:
        """What the choice does to the logits; None for most, which cost nothing then."""
        asked = self.completion.request.sampling
        if not (asked.logit_bias or asked.frequency_penalty or asked.presence_penalty or grammar):
            return None
        return Adjustments(
            bias=asked.logit_bias,
            frequency_penalty=asked.frequency_penalty,
            presence_penalty=asked.presence_penalty,
            grammar=grammar,
        )

    def _say(self, text: str, *, last: bool = False) -> None:
        logprobs = None
        if self._chances is not None:
            logprobs = self._chances.take(text)
            if last and not self._text.stopped:
                logprobs += self._chances.rest()
        if text or logprobs:
            self.completion.words.append(Delta(index=self.index, text=text, logprobs=logprobs))

    def _end(self, reason: FinishReason, text: str) -> None:
        self._say(text, last=True)
        self.reason = FinishReason.STOP if self._text.stopped else reason
        self.completion.words.append(
            Finished(
                index=self.index,
                reason=self.reason,
                prompt_tokens=len(self.completion.prompt_ids),
                completion_tokens=self.made_tokens,
                cached_tokens=self.completion.cached_tokens,
            )
        )


def open_sequences(completion: Completion, tokenizer: Decoder, *, tokens: TokenBytes | None = None) -> None:
    """Give the completion its `n` choices. `tokens`: needed for log-probabilities."""
    count = completion.request.sampling.n
    completion.sequences = [Sequence(completion, index, tokenizer, tokens=tokens) for index in range(count)]
