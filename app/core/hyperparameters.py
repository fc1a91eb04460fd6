"""Turns "auto" into numbers from the size of the data, the base model and what is trained. Pure.

The reasons stand in docs/hyperparameters.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Factors start at zero and are scaled down; whole weights stand that much less.
FULL_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Hyperparameters:
    """Numbers a trainer can use."""

    n_epochs: int
    batch_size: int
    learning_rate_multiplier: float

    def as_json(self) -> dict[str, Any]:
        """As they stand in the job object."""
        return {
            "n_epochs": self.n_epochs,
            "batch_size": self.batch_size,
            "learning_rate_multiplier": self.learning_rate_multiplier,
        }


def resolve(asked: dict[str, Any], *, n_examples: int) -> Hyperparameters:
    """Replace every "auto"; numbers the user gave stay as they are, but no batch exceeds the data."""
    batch_size = _or_auto(asked.get("batch_size"), auto_batch_size(n_examples))
    return Hyperparameters(
        n_epochs=_or_auto(asked.get("n_epochs"), auto_n_epochs(n_examples)),
        batch_size=min(batch_size, n_examples),
        learning_rate_multiplier=float(_or_auto(asked.get("learning_rate_multiplier"), 1.0)),
    )


def auto_n_epochs(n_examples: int) -> int:
    """Three passes; more for a handful of examples, fewer for very many."""
    if n_examples < 34:
        return min(25, 100 // n_examples)
    if n_examples > 8333:
        return max(1, 25_000 // n_examples)
    return 3


def auto_batch_size(n_examples: int) -> int:
    """The largest power of two up to 16 that leaves at least 16 steps an epoch."""
    size = 1
    while size < 16 and size * 2 <= n_examples / 16:
        size *= 2
    return size


def learning_rate(multiplier: float, *, base_rate: float, adapter: str) -> float:
    """The rate at its peak. `base_rate` is the base model's own for adapters, from the catalogue."""
    return multiplier * base_rate * (FULL_SHARE if adapter == "full" else 1.0)


def _or_auto(value: Any, auto: Any) -> Any:
    return auto if value in (None, "auto") else value
