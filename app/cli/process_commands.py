"""Command lines of Luthier's own processes, each on a leash, with the environment they are given."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import app as package
from app.cli.supervisor import Part
from app.core.settings import get_settings

LEASH = Path(__file__).with_name("leash.py")
SOURCE_ROOT = Path(package.__file__).parents[1]
API_GRACE_S = 6.0  # open streams get 5 s
WORKER_GRACE_S = 6.0  # open streams get 5 s; a trainer gets its own time on top


def leashed(argv: list[str], *, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs `argv` on a leash: it ends when its standard input closes."""
    return [sys.executable, "-I", "-S", str(LEASH), *options, "--", *argv]


def worker_grace_s(queue: str) -> float:
    """How long a worker of that queue may take to stop."""
    return WORKER_GRACE_S + (get_settings().trainer_grace_s if queue == "training" else 0.0)


def luthier(*words: str) -> list[str]:
    """The command line of `luthier WORDS`, of this very code, wherever it is started from."""
    return [
        sys.executable,
        "-P",
        "-m",
        "app.cli.main",
        *words,
    ]  # -P: an `app` in the current folder is not ours


def child_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `settings` on top; our own code is found without installation.

    Without the operator's key: the parts know it as a hash in the database, which is all they need.
    """
    paths = [str(SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    inherited = {name: value for name, value in os.environ.items() if name != "LUTHIER_API_KEY"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **settings}


def service_parts(data_dir: Path, settings: Mapping[str, str]) -> list[Part]:
    """The API and one worker of each kind."""
    environment = child_environment(settings)

    def part(name: str, words: tuple[str, ...], grace_s: float) -> Part:
        argv = leashed(luthier(*words), options=("--grace", str(grace_s)))
        log_file = data_dir / "logs" / f"{name}.log"
        return Part(name, argv, log_file, env=environment, grace_s=grace_s, cwd=data_dir)

    parts = [part("api", ("api",), API_GRACE_S)]
    for queue in ("control", "training", "inference"):
        parts.append(part(queue, ("worker", "--queues", queue), worker_grace_s(queue)))
    return parts
