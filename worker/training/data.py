"""Training data as tensors: files become tokenised examples, examples become flat batches without padding.

Knows the JSONL format through `app.core.dataset` and tokens through the chat template, and no model.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from app.core.dataset import DatasetError, Example, read_examples, read_lines
from app.core.failures import FailureCode
from worker.chat_template import ChatTemplate, ChatTemplateError, TokenizedExample
from worker.training.errors import TrainingError
from worker.training.pulse import Pulse
from worker.training.tree import common_tokens, shared_branches, single_branches
from worker.training.words import Log, Section, Working

_HIDDEN_CALLS = (
    "Assistant messages that only call tools are not trained: this base model's chat template does not "
    "show tool calls to the model."
)


@dataclass(slots=True)
class Split:
    """The examples of one file, ready to train on, and what had to be done to them."""

    examples: list[TokenizedExample] = field(default_factory=list)
    cut: int = 0  # examples shortened to the limit
    dropped: int = 0  # examples without a single trained token left
    deaf_tools: int = 0  # examples whose tools the chat template does not show to the model
    hidden_calls: int = 0  # examples with messages of tool calls alone, which it does not show either

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    def sha256(self) -> str:
        """Hex digest of what is trained on: every token, and which of them are labels."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(len(example.ids).to_bytes(8, "little"))
            digest.update(array("q", example.ids).tobytes())
            digest.update(bytes(example.is_label))
        return digest.hexdigest()

    def add(self, example: Example, template: ChatTemplate, max_length: int) -> None:
        """Tokenise one more example, cut at `max_length` tokens."""
        self.deaf_tools += bool(example.tools) and not template.supports_tools
        self.hidden_calls += any(template.hides(message) for message in example.messages)
        tokens = template.encode_example(example.messages, example.tools)
        self.cut += len(tokens.ids) > max_length
        tokens = TokenizedExample(tokens.ids[:max_length], tokens.is_label[:max_length])
        if any(tokens.is_label[1:]):  # nothing precedes the first token, so it cannot be predicted
            self.examples.append(tokens)
        else:
            self.dropped += 1

    def warnings(self, name: str, max_length: int) -> Iterator[Log]:
        """One warning for each thing that was done to examples of the file called `name`."""
        if self.cut:
            yield Log(
                level="warn",
                message=f"{self.cut} example(s) of the {name} file were longer than {max_length} tokens and "
                "were cut at the end.",
            )
        if self.dropped:
            yield Log(
                level="warn",
                message=f"{self.dropped} example(s) of the {name} file were left out: no assistant message "
                f"with weight 1 lies within their first {max_length} tokens.",
            )
        if self.deaf_tools:
            yield Log(
                level="warn",
                message=f"{self.deaf_tools} example(s) of the {name} file have tools, which this base "
                "model's chat template does not show to the model.",
            )
        if self.hidden_calls:
            yield Log(
                level="warn",
                message=f"{_HIDDEN_CALLS} This concerns {self.hidden_calls} example(s) of the {name} file.",
            )


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Examples laid end to end: T tokens in segments, N labels.

    Segment i is `lengths[i]` tokens that go on where segment `parents[i]` ends, or begin where it is -1.
    """

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, starting at 0 in each example
    parents: tuple[int, ...]
    lengths: tuple[int, ...]
    rows: torch.Tensor  # (N,) int64, the tokens whose next token is trained
    labels: torch.Tensor  # (N,) int64, that next token


def read_split(
    path: str | Path, param: str, *, template: ChatTemplate, max_length: int, max_line_bytes: int
) -> Generator[Working, None, Split]:
    """Tokenise every example of a file, cut at `max_length` tokens, with signs of life on the way.

    `param` is the job's field the file came from. Raises TrainingError when nothing is left to train on.
    """
    split, pulse = Split(), Pulse(Section.SETUP)
    number = 0
    try:
        with Path(path).open("rb") as file:
            lines = read_lines(file, max_line_bytes=max_line_bytes)
            for number, example in enumerate(read_examples(lines), start=1):  # noqa: B007 told in the error
                split.add(example, template, max_length)
                yield from pulse.beat()
    except DatasetError as error:
        raise _invalid(param, error.message) from error
    except ChatTemplateError as error:
        raise _invalid(param, f"Example {number}: {error}") from error
    if not split.examples:
        raise TrainingError(
            FailureCode.NO_TRAINABLE_TOKENS, _nothing_left(param, split, max_length), param=param
        )
    return split


def epoch_batches(
    examples: Sequence[TokenizedExample], batch_size: int, *, seed: int, epoch: int
) -> Iterator[list[TokenizedExample]]:
    """The batches of one epoch, in an order fixed by `seed` and `epoch`. The last one may be smaller."""
    order = list(range(len(examples)))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 an order, not a secret
    for start in range(0, len(order), batch_size):
        yield [examples[index] for index in order[start : start + batch_size]]


def sample_examples(examples: Sequence[TokenizedExample], count: int, seed: int) -> list[int]:
    """Indices of a fixed subset: at most `count`, the same at every call with one seed."""
    if len(examples) <= count:
        return list(range(len(examples)))
    return sorted(random.Random(seed).sample(range(len(examples)), count))  # noqa: S311 a sample, not a secret


def micro_batches(
    batch: Sequence[TokenizedExample], max_tokens: int, *, share_prefixes: bool = False
) -> Iterator[list[TokenizedExample]]:
    """Parts of a batch of at most `max_tokens` tokens each; a longer example is a part of its own.

    With `share_prefixes` those that begin alike come together, and what they share counts once.
    """
    if share_prefixes:
        batch = sorted(batch, key=lambda example: example.ids)
    part: list[TokenizedExample] = []
    tokens = 0
    for example in batch:
        length = len(example.ids)
        if part and share_prefixes:
            length -= common_tokens(part[-1].ids, example.ids)
        if part and tokens + length > max_tokens:
            yield part
            part, tokens, length = [], 0, len(example.ids)
        part.append(example)
        tokens += length
    if part:
        yield part


def label_count(batch: Sequence[TokenizedExample]) -> int:
    """Trained tokens of a batch."""
    return sum(sum(example.is_label[1:]) for example in batch)


def flatten(
    batch: Sequence[TokenizedExample], device: torch.device, *, share_prefixes: bool = False
) -> FlatBatch:
    """Lay examples end to end; the token before each label is the row that must predict it.

    Tokens from an example's last label on predict nothing that is trained and are left out. With
    `share_prefixes` tokens that examples begin with stand there once; a row can then have several labels.
    """
    wanted = [[at for at in range(1, len(e.ids)) if e.is_label[at]] for e in batch]
    kept = [example.ids[: labels[-1]] for example, labels in zip(batch, wanted, strict=True)]
    tree = shared_branches(kept) if share_prefixes else single_branches(kept)
    ids, positions = [0] * sum(tree.lengths), [0] * sum(tree.lengths)
    rows: list[int] = []
    labels: list[int] = []
    for number, example in enumerate(batch):
        places = tree.places(number)
        for at, place in enumerate(places):
            ids[place], positions[place] = kept[number][at], at
        rows += [places[at - 1] for at in wanted[number]]
        labels += [example.ids[at] for at in wanted[number]]
    tensors = [
        torch.tensor(values, dtype=torch.int64, device=device) for values in (ids, positions, rows, labels)
    ]
    return FlatBatch(tensors[0], tensors[1], tuple(tree.parents), tuple(tree.lengths), tensors[2], tensors[3])


def _invalid(param: str, what: str) -> TrainingError:
    """In the words in which a file is refused before its job is queued."""
    message = f"The job failed due to an invalid {param.replace('_', ' ')}. {what}"
    return TrainingError(FailureCode(f"invalid_{param}"), message, param=param)


def _nothing_left(param: str, split: Split, max_length: int) -> str:
    text = (
        f"No example of {param} has a trained token within its first {max_length} tokens. Raise "
        "luthier.max_length, shorten what precedes the assistant's messages, or set their weight to 1."
    )
    return f"{text} {_HIDDEN_CALLS}" if split.hidden_calls else text
