"""Tokens of a training file, counted where it is checked: without transformers, and in bounded time.

It renders the model's chat template in jinja and asks the model's tokenizer. What is trained on is what the
trainer encodes with transformers (`worker/chat_template.py`); this is for estimates, and of a long file it
counts a sample: the longest lines, which decide about memory, and lines spread evenly, for the sum.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from app.core.dataset import Example, read_examples, read_lines
from app.core.memory import Row
from worker.chat_template import normalize, parse_tools
from worker.training.rows import rows_of

log = logging.getLogger(__name__)
LONGEST = 64  # lines
SPREAD = 960  # lines
MOST_BYTES = 4 * 2**20  # of all lines that are counted: some seconds of work
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Counted:
    """What is known of one file. `rows` are those that were counted."""

    examples: int
    tokens: int  # of all examples, each cut at the job's max_length
    rows: tuple[Row, ...]


class TokenCounter:
    """One model's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, render: Callable[[Example], str]) -> None:
        self._tokenizer = tokenizer
        self._render = render

    def encode(self, example: Example) -> tuple[list[int], int]:
        """Token ids of a whole conversation, and how many of them are trained."""
        ids: list[int] = self._ids(self._render(example))
        labels = sum(self._labels(message) for message in example.messages)
        return ids, min(labels, len(ids))

    def _labels(self, message: dict[str, Any]) -> int:
        if message["role"] != "assistant" or message.get("weight") == 0:
            return 0
        plain = normalize([message])[0]
        calls = plain.get("tool_calls")
        return len(self._ids(plain["content"] + (json.dumps(calls) if calls else ""))) + 1  # end of turn

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


@lru_cache(maxsize=4)
def find_counter(folder: Path, template: str | None) -> TokenCounter | None:
    """The counter of the model in `folder`; None where its tokenizer or template is not of a known form."""
    try:
        from tokenizers import Tokenizer

        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        own = folder / "chat_template.jinja"
        template = template or (own.read_text(encoding="utf-8") if own.is_file() else config["chat_template"])
        special = {name: _content(config[name]) for name in _SPECIAL if config.get(name)}
        return TokenCounter(Tokenizer.from_file(str(folder / "tokenizer.json")), _renderer(template, special))
    except Exception as error:  # a foreign file in whatever form, and Rust's errors have no class
        log.info("tokens of %s cannot be counted: %s", folder.name, type(error).__name__)
        return None


def count_tokens(
    path: Path, lengths: Sequence[int], *, counter: TokenCounter, max_length: int, shares: bool
) -> Counted | None:
    """Tokens of a checked file whose lines have `lengths` bytes; None where its template refuses a line.

    `shares`: whether rows that begin alike are computed once.
    """
    longest, spread = _choose(lengths)
    try:
        encoded = {
            number: counter.encode(example) for number, example in _examples(path, {*longest, *spread})
        }
    except Exception as error:  # whatever a template makes of a conversation: the trainer will tell
        log.info("tokens of a file cannot be counted: %s", type(error).__name__)
        return None
    cut = {number: (ids[:max_length], min(labels, max_length)) for number, (ids, labels) in encoded.items()}
    if len(cut) == len(lengths):
        tokens = sum(len(ids) for ids, _ in cut.values())
    else:
        of_bytes = sum(lengths[number] for number in spread)
        rate = sum(len(encoded[number][0]) for number in spread) / max(1, of_bytes)
        tokens = round(sum(min(max_length, rate * length) for length in lengths))
    return Counted(len(lengths), tokens, rows_of(list(cut.values()), shares=shares))


def _choose(lengths: Sequence[int]) -> tuple[list[int], list[int]]:
    """Numbers of the longest lines, and of lines spread evenly, within the bytes that may be counted."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    step = max(1, -(-len(lengths) // SPREAD))
    return (
        _within(order[:LONGEST], lengths, MOST_BYTES // 2),
        _within(list(range(0, len(lengths), step)), lengths, MOST_BYTES // 2),
    )


def _within(numbers: list[int], lengths: Sequence[int], most: int) -> list[int]:
    """The first of `numbers` that together have at most so many bytes, but at least one."""
    kept: list[int] = []
    for number in numbers:
        most -= lengths[number]
        if kept and most < 0:
            break
        kept.append(number)
    return kept


def _examples(path: Path, wanted: set[int]) -> list[tuple[int, Example]]:
    with path.open("rb") as file:
        lines = [(n, line) for n, line in enumerate(read_lines(file, max_line_bytes=2**62)) if n in wanted]
    return list(zip((n for n, _ in lines), read_examples(line for _, line in lines), strict=True))


def _renderer(template: str, special: dict[str, str]) -> Callable[[Example], str]:
    """The template in the environment that transformers documents for chat templates."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[loopcontrols],
        autoescape=False,  # no HTML
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: form
    compiled = environment.from_string(template)

    def render(example: Example) -> str:
        return compiled.render(
            messages=normalize(example.messages),
            tools=parse_tools(example.tools),
            add_generation_prompt=False,
            **special,
        )

    return render


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **({"ensure_ascii": False} | options))


def _refuse(message: str) -> None:
    raise ValueError(message)


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)
