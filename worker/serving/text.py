"""Token ids become text that may be sent: whole characters only, never a stop string.

`TextStream` belongs to one choice. What it gives out, joined, equals the tokenizer's decoding of all ids at
once (special tokens skipped), cut before the stop string that is complete first. It knows tokenizers and
strings, nothing of models, requests or channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not (yet) UTF-8


class Decoder(Protocol):
    """The one call of a tokenizer that is used here."""

    def decode(
        self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool
    ) -> str: ...


def decode_all(tokenizer: Decoder, ids: list[int]) -> str:
    """Text of `ids` in one go; what the pieces of a `TextStream` add up to."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Decodes ids one at a time, holding back characters whose bytes are not all there.

    Only a window of recent ids is decoded again: from one boundary before the last text given out, because
    some tokenizers (SentencePiece) drop a leading space and need the token to the left for context. Exact
    for byte-level tokenizers; one with byte fallback decodes a run of byte tokens as a whole, so a run that
    ends the answer broken may show fewer U+FFFD than decoding all at once would.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._context = 0  # ids at the window's start whose text is known to be whole and sent
        self._sent = 0  # characters of the window's text that were given out

    def push(self, token_id: int) -> str:
        """New text that is certain after one more id; often empty inside a multi-byte character."""
        self._window.append(token_id)
        text = decode_all(self._tokenizer, self._window)
        # Trailing replacement signs may be the first bytes of a character that the next id completes.
        certain = text.rstrip(REPLACEMENT)
        new = certain[self._sent :]
        self._sent = max(self._sent, len(certain))
        if len(certain) == len(text) and new:
            self._shift()
        return new

    def flush(self) -> str:
        """What is left at the end, broken bytes shown as U+FFFD."""
        return decode_all(self._tokenizer, self._window)[self._sent :]

    def _shift(self) -> None:
        """Keep only the ids since the last boundary as context for the next ones."""
        self._window = self._window[self._context :]
        self._context = len(self._window)
        self._sent = len(decode_all(self._tokenizer, self._window))


class TextStream:
    """One choice's text on its way out; `stopped` turns true when a stop string is complete."""

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = tuple(text for text in stop if text)
        self._held = ""  # end of the text so far that may be the beginning of a stop string
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that may be sent after one more id. Nothing more may be pushed once `stopped`."""
        return self._filter(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """The rest, when the choice ended for another reason than a stop string."""
        text = self._filter(self._detokenizer.flush())
        held, self._held = self._held, ""
        return text + held

    def _filter(self, new: str) -> str:
        if not self._stop or not new:
            return new
        text = self._held + new
        cut = find_stop(text, self._stop)
        if cut is not None:
            self.stopped, self._held = True, ""
            return text[:cut]
        keep = len(text) - partial_stop(text, self._stop)
        self._held = text[keep:]
        return text[:keep]


def find_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the stop string that is complete first begins (the longest of those ending there), or None.

    Completion, not beginning, decides: so the answer does not depend on how the text was cut into pieces.
    """
    found = [(at + len(word), at) for word in stop if (at := text.find(word)) >= 0]
    return min(found)[1] if found else None


def partial_stop(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    longest = min(len(text), max(len(word) for word in stop) - 1)
    for length in range(longest, 0, -1):
        if any(word.startswith(text[-length:]) for word in stop if len(word) > length):
            return length
    return 0
