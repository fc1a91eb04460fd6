"""A queue as Celery's documentation sets it up, for the control group: a broker, a task, nothing else.

The task says in a file that it starts, works for a while, and says that it has ended.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Celery

app = Celery("stock", broker=os.environ.get("STOCK_BROKER", "redis://127.0.0.1:1/0"))
if os.environ.get("STOCK_ACKS_LATE"):
    app.conf.task_acks_late = True


@app.task
def work(name: str, seconds: float) -> None:
    """A job of the control group."""
    tell("start", name)
    time.sleep(seconds)
    tell("end", name)


def tell(word: str, name: str) -> None:
    """One line; a short append is whole."""
    with Path(os.environ["STOCK_FILE"]).open("a") as file:
        file.write(f"{word} {name}\n")
