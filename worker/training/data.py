"""Training data as tensors: files become tokenised examples, examples become flat batches without padding.

Knows the JSONL format through `app.core.dataset` and tokens through the chat template, and no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from app.core.dataset import DatasetError, read_examples, read_lines
from worker.chat_template import ChatTemplate, ChatTemplateError, TokenizedExample
from worker.training.errors import TrainingError
from worker.training.words import Log


@dataclass(frozen=True, slots=True)
class Split:
    """The examples of one file, ready to train on, and what had to be done to them."""

    examples: list[TokenizedExample]
    cut: int = 0  # examples shortened to the limit
    dropped: int = 0  # examples without a single trained token left
    deaf_tools: int = 0  # examples whose tools the chat template does not show to the model

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

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


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Examples laid end to end: T tokens, N labels.

    First `prefix` tokens that all examples begin with, then `lengths[i]` tokens of example i's own.
    """

    ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64, starting at 0 in each example
    prefix: int
    lengths: tuple[int, ...]
    rows: torch.Tensor  # (N,) int64, the tokens whose next token is trained
    labels: torch.Tensor  # (N,) int64, that next token


def read_split(path: str | Path, param: str, template: ChatTemplate, max_length: int) -> Split:
    """Tokenise every example of a file, cut at `max_length` tokens.

    `param` is the job's field the file came from. Raises TrainingError when nothing is left to train on.
    """
    examples: list[TokenizedExample] = []
    cut = dropped = deaf_tools = number = 0
    try:
        with Path(path).open("rb") as file:
            for example in read_examples(read_lines(file)):
                number += 1
                deaf_tools += bool(example.tools) and not template.supports_tools
                tokens = template.encode_example(example.messages, example.tools)
                cut += len(tokens.ids) > max_length
                tokens = TokenizedExample(tokens.ids[:max_length], tokens.is_label[:max_length])
                if any(tokens.is_label[1:]):  # nothing precedes the first token, so it cannot be predicted
                    examples.append(tokens)
                else:
                    dropped += 1
    except DatasetError as error:
        raise TrainingError(f"invalid_{param}", error.message, param=param) from error
    except ChatTemplateError as error:
        message = f"Example {number}: {error}"
        raise TrainingError(f"invalid_{param}", message, param=param) from error
    if not examples:
        raise TrainingError("no_trainable_tokens", _nothing_left(param, max_length), param=param)
    return Split(examples, cut, dropped, deaf_tools)


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


def micro_batches(batch: Sequence[TokenizedExample], max_tokens: int) -> Iterator[list[TokenizedExample]]:
    """Parts of a batch of at most `max_tokens` tokens each; a longer example is a part of its own."""
    part: list[TokenizedExample] = []
    tokens = 0
    for example in batch:
        if part and tokens + len(example.ids) > max_tokens:
            yield part
            part, tokens = [], 0
        part.append(example)
        tokens += len(example.ids)
    if part:
        yield part


def label_count(batch: Sequence[TokenizedExample]) -> int:
    """Trained tokens of a batch."""
    return sum(sum(example.is_label[1:]) for example in batch)


def flatten(
    batch: Sequence[TokenizedExample], device: torch.device, *, share_prefix: bool = False
) -> FlatBatch:
    """Lay examples end to end; the token before each label is the row that must predict it.

    Tokens from an example's last label on predict nothing that is trained and are left out. With
    `share_prefix` the tokens all examples begin with stand in front once (Tree Training, 2025).
    """
    starts = _shared_tokens(batch) if share_prefix and len(batch) > 1 else 0
    ids = list(batch[0].ids[:starts])
    positions = list(range(starts))
    rows: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for example in batch:
        wanted = [at for at in range(1, len(example.ids)) if example.is_label[at]]
        offset, end = len(ids) - starts, wanted[-1]
        rows += [offset + at - 1 for at in wanted]
        labels += [example.ids[at] for at in wanted]
        positions += range(starts, end)
        ids += example.ids[starts:end]
        lengths.append(end - starts)
    tensors = [
        torch.tensor(values, dtype=torch.int64, device=device) for values in (ids, positions, rows, labels)
    ]
    return FlatBatch(tensors[0], tensors[1], starts, tuple(lengths), tensors[2], tensors[3])


def _shared_tokens(batch: Sequence[TokenizedExample]) -> int:
    """How many tokens all examples begin with, none of them a row: rows predict different labels."""
    first_rows = [example.is_label.index(True, 1) - 1 for example in batch]
    shortest, longest = min(e.ids for e in batch), max(e.ids for e in batch)  # in dictionary order
    differ = (at for at, (a, b) in enumerate(zip(shortest, longest, strict=False)) if a != b)
    return min(next(differ, len(shortest)), *first_rows)


def _nothing_left(param: str, max_length: int) -> str:
    return (
        f"No example of {param} has a trained token within its first {max_length} tokens. Raise "
        "luthier.max_length, shorten what precedes the assistant's messages, or set their weight to 1."
    )
