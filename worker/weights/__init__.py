"""Bringing the weights of the catalogue to this machine. Knows no database, queue or settings."""

from worker.weights.pull import check_model_dir, pull
from worker.weights.words import Progress, WeightsError

__all__ = ["Progress", "WeightsError", "check_model_dir", "pull"]
