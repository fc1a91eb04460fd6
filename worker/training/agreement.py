"""Held against the engine that will serve it: does what was trained answer there as it answers here?

The engine comes as an object with the three calls below; which one it is, this page does not know. A few rows
are rendered by both before the first step, and scored by both before the attempt may finish.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import torch

from app.core.dataset import Example, read_examples, read_lines
from app.core.failures import FailureCode
from app.core.manifest import write_manifest
from worker.chat_template import ChatTemplate, TokenizedExample
from worker.training.errors import TrainingError
from worker.training.model import TunedModel
from worker.training.plan import Plan
from worker.training.pulse import Pulse
from worker.training.words import Adapter, Log, Section, TrainSpec, TrainWord

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 4
LOOKED_AT = 16  # examples at the beginning of the file, among which the rows are
TOKENS = 1024  # of all rows together
SHARE = 50  # and of the tokens to train at most one in so many, but always one row
ANSWER_TOKENS = 128  # of each row
EXACT_NATS = 1e-3  # mean difference allowed in float32, where both sides compute the same sums
# Where they round to bfloat16 on the way, in another order: 0.03 with a 135M model on 176 tokens.
ROUNDED_NATS = 0.1


class Server(Protocol):
    """An engine over the model in training. Each call raises ValueError for what it cannot serve."""

    def prompt_ids(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[int]: ...

    def ends_answer(self, token_id: int) -> bool: ...

    def log_probabilities(
        self, adapter_dir: Path | None, rows: Sequence[tuple[list[int], list[int]]]
    ) -> list[list[float]]: ...


OpenServer = Callable[["PreTrainedModel", "PreTrainedTokenizerBase", str | None], Server]


@dataclass(frozen=True, slots=True)
class _Row:
    """One answer as it is trained, and the conversation before it."""

    before: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    prompt: list[int]
    answer: list[int]
    whole: bool  # its last token is the end of its turn

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.answer)


class Agreement:
    """The rows of one job, rendered alike by both sides. Raises TrainingError where they are not."""

    def __init__(
        self, plan: Plan, tuned: TunedModel, tokenizer: PreTrainedTokenizerBase, open: OpenServer
    ) -> None:
        self._tuned, self._spec = tuned, plan.spec
        self._held_out = plan.spec.validation_file is not None
        template = ChatTemplate(tokenizer, plan.spec.chat_template)
        self._rows = _choose(_rows(plan.spec, template), min(TOKENS, plan.trained_tokens // SHARE))
        try:
            with tuned.bare() as model:
                self._server = open(model, tokenizer, plan.spec.chat_template)
            self._compare_prompts(tokenizer)
        except ValueError as error:
            raise _mismatch(f"The engine cannot serve it: {error}.") from error

    def check(self, step: int) -> Generator[TrainWord, None, None]:
        """Score the rows both ways with the weights in memory; says what was found."""
        if not self._rows:
            return
        yield from Pulse(Section.VALIDATION, step).begin()
        ours, theirs = self._scores()
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        mean, limit = sum(gaps) / len(gaps), self._limit_nats()
        if not mean <= limit:  # also where it is no number
            raise _mismatch(
                f"Over {len(gaps)} tokens of {len(self._rows)} answers its log-probabilities are "
                f"{mean:.3g} nats off those of the trainer; {limit:g} are allowed."
            )
        kind = "held-out" if self._held_out else "training"
        yield Log(
            message=f"The serving engine agrees with the trainer: {len(self._rows)} {kind} answer(s) of "
            f"{len(gaps)} tokens, log-probabilities {mean:.1g} nats apart on average ({limit:g} allowed)."
        )

    def _compare_prompts(self, tokenizer: PreTrainedTokenizerBase) -> None:
        controls = set(tokenizer.added_tokens_decoder)
        for row in self._rows:
            if self._server.prompt_ids(row.before, row.tools) != row.prompt:
                raise _mismatch("It reads a conversation of the data as other tokens than the trainer.")
            last = row.answer[-1]
            if row.whole and last in controls and not self._server.ends_answer(last):
                raise _mismatch("It does not know the token by which trained answers end.")

    def _scores(self) -> tuple[list[float], list[float]]:
        tuned = self._tuned
        tuned.model.train(False)
        with torch.no_grad():
            ours = [p for row in self._rows for p in tuned.log_probabilities(_example(row)).tolist()]
        rows = [(row.prompt, row.answer) for row in self._rows]
        try:
            if self._spec.adapter is Adapter.FULL:
                with tuned.autocast():
                    found = self._server.log_probabilities(None, rows)
            else:
                with self._saved() as folder, tuned.bare():
                    found = self._server.log_probabilities(folder, rows)
        except ValueError as error:
            raise _mismatch(f"The engine cannot serve it: {error}.") from error
        tuned.model.train()
        return ours, [p for row in found for p in row]

    @contextmanager
    def _saved(self) -> Iterator[Path]:
        """The adapter as a checkpoint holds it; the checkpoint itself may have gone to storage by now."""
        parent = Path(self._spec.output_dir)
        parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=parent, prefix=".agreement-") as name:
            self._tuned.save(Path(name))
            write_manifest(Path(name))
            yield Path(name)

    def _limit_nats(self) -> float:
        return EXACT_NATS if self._tuned.dtype is torch.float32 else ROUNDED_NATS


def _choose(rows: Iterator[_Row], budget: int) -> list[_Row]:
    """The first few that fit into `budget` tokens, else the shortest."""
    chosen: list[_Row] = []
    seen = list(rows)
    for row in seen:
        if len(chosen) < ROWS and row.tokens <= budget:
            chosen.append(row)
            budget -= row.tokens
    return chosen or sorted(seen, key=lambda row: row.tokens)[:1]


def _rows(spec: TrainSpec, template: ChatTemplate) -> Iterator[_Row]:
    """Answers from the beginning of the validation file, or of the training file; one an example."""
    with Path(spec.validation_file or spec.training_file).open("rb") as file:
        lines = read_lines(file, max_line_bytes=spec.max_line_bytes)
        for example in islice(read_examples(lines), LOOKED_AT):
            row = _first_answer(example, template, spec.max_length)
            if row is not None:
                yield row


def _first_answer(example: Example, template: ChatTemplate, max_length: int) -> _Row | None:
    """The first trained answer within `max_length` tokens; None without one, or where nothing precedes it.

    Not a later one: what an answer before it makes its last token join with, only its trainer cuts apart.
    """
    tokens = template.encode_example(example.messages, example.tools)
    number = next((at for at, message in enumerate(example.messages) if _is_trained(message, template)), 0)
    if number == 0 or True not in tokens.is_label[:max_length]:
        return None
    start = tokens.is_label.index(True)
    turn = list(takewhile(bool, tokens.is_label[start:]))
    length = min(len(turn), max_length - start, ANSWER_TOKENS)
    return _Row(
        before=example.messages[:number],
        tools=example.tools,
        prompt=tokens.ids[:start],
        answer=tokens.ids[start : start + length],
        whole=length == len(turn),
    )


def _is_trained(message: dict[str, Any], template: ChatTemplate) -> bool:
    return message["role"] == "assistant" and message.get("weight") != 0 and not template.hides(message)


def _example(row: _Row) -> TokenizedExample:
    return TokenizedExample(row.prompt + row.answer, [False] * len(row.prompt) + [True] * len(row.answer))


def _mismatch(what: str) -> TrainingError:
    return TrainingError(
        FailureCode.SERVING_MISMATCH,
        f"The engine that answers in chat does not agree with the trainer about this model. {what} "
        "It would not answer as it was trained, so it is not offered. Tell the operator.",
    )
