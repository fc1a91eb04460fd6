"""Grammars of answers, compiled for one model's tokens: which token may come next.

The library is llguidance: an Earley parser over a lexer of derivatives, in Rust, which knows JSON schemas.
Compiling takes up to a second for the largest grammars let in, so it is done outside the engine's thread.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from threading import Lock

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from torch import Tensor

REMEMBERED = 64  # compiled grammars; each takes up to some MB
_log = logging.getLogger(__name__)


class GrammarError(ValueError):
    """A grammar that cannot be compiled for this model."""


class GrammarState:
    """Where one choice stands in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, vocabulary: int) -> Tensor | None:
        """Bool of shape `vocabulary`: what may come. None once the grammar is beyond its limits."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            _log.warning("a grammar gave up: %s", self._matcher.get_error())
            return None
        allowed = np.unpackbits(bits, bitorder="little", count=vocabulary).astype(np.bool_)
        return torch.from_numpy(allowed)

    def take(self, token_id: int) -> None:
        """Go on by a token that the mask allowed."""
        if not self._matcher.is_stopped():  # the end token may come after the last one
            self._matcher.consume_token(token_id)


class Grammars:
    """Compiled grammars of one model, the last used ones kept. May be called from any thread."""

    def __init__(self, vocabulary: LLTokenizer) -> None:
        self._vocabulary = vocabulary
        self._lock = Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        # Bounds of one step, which all streams wait for: some ten milliseconds at most.
        self._limits = LLParserLimits(
            step_max_items=20_000, step_lexer_fuel=100_000, max_grammar_size=200_000, verbose_errors=False
        )

    def start(self, grammar: str) -> GrammarState:
        """The beginning of an answer; compiles at the first use. Raises GrammarError."""
        return GrammarState(self.compile(grammar).deep_copy())

    def compile(self, grammar: str) -> LLMatcher:
        """Make sure that `start` takes no time."""
        with self._lock:
            found = self._compiled.get(grammar)
            if found is not None:
                self._compiled.move_to_end(grammar)
                return found
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.deep_copy().compute_bitmask()  # the first mask is the slowest
        if matcher.is_error():
            raise GrammarError(matcher.get_error())
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > REMEMBERED:
                self._compiled.popitem(last=False)
        return matcher
