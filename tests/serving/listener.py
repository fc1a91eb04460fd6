"""Collects the words of one request, as an inference task would, and checks their order."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Event

from app.core.completions import CompletionRequest, Delta, Failed, Finished, Word

PATIENCE_S = 30.0


def until(condition: Callable[[], object]) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


class Listener:
    """Callable given to `Engine.submit`; `wait` returns when the last word has come."""

    def __init__(self, request: CompletionRequest) -> None:
        self.choices = request.sampling.n
        self.words: list[Word] = []
        self.first = Event()
        self.done = Event()

    def __call__(self, words: list[Word]) -> None:
        assert words, "an empty list is no news"
        assert not self.done.is_set(), "a word after the last one"
        self.words += words
        self.first.set()
        if self.failed or len(self.finished) == self.choices:
            self.done.set()

    @property
    def failed(self) -> Failed | None:
        return next((word for word in self.words if isinstance(word, Failed)), None)

    @property
    def finished(self) -> dict[int, Finished]:
        return {word.index: word for word in self.words if isinstance(word, Finished)}

    def wait(self) -> Listener:
        assert self.done.wait(PATIENCE_S), f"no last word; so far: {self.words}"
        return self

    def text(self, index: int = 0) -> str:
        return "".join(word.text for word in self.words if isinstance(word, Delta) and word.index == index)
