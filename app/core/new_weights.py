"""Word of new weights, from the runner that made them to every inference worker: they load ahead of requests.

Only a nudge: the row is the truth, and weights nobody was told of are loaded by their first request.
"""

from __future__ import annotations

import redis

from app.core.completions import TunedWeights, Wire

NEW_WEIGHTS = "luthier:new-weights"  # pub/sub channel


class NewWeights(Wire):
    """A tuned model that answers from now on; `tuned.path` is a key in storage."""

    base_model: str
    tuned: TunedWeights


def announce(client: redis.Redis, news: NewWeights) -> None:
    """Tell all inference workers; one that is not there has nothing to load."""
    client.publish(NEW_WEIGHTS, news.model_dump_json())
