"""Reaches into a trainer's child from outside, because this folder stands on the PYTHONPATH of its worker.

Python imports a module of this name at start-up. In a trainer it notes every optimizer step (a witness
that no table can contradict), paces steps, and does harm where a file in CHAOS_FOLDER asks for it.
Everywhere else it does nothing. The product has no such switches.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = os.environ.get("CHAOS_FOLDER", "")
now: dict[str, Any] = {"job": "", "attempt": 0, "seed": 0, "step": 0}


def note_step(*_: object) -> None:
    """Called before each optimizer step, in the thread that trains."""
    now["step"] += 1
    line = f"{time.monotonic():.4f} {now['job']} {now['attempt']} {os.getpid()} {now['step']}\n"
    log = os.open(f"{FOLDER}/steps.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, line.encode())
    os.close(log)
    with suppress(OSError, ValueError), Path(FOLDER, "orders.json").open() as file:
        for order in json.load(file):
            meant = all(order.get(name) in (None, now[name]) for name in ("job", "attempt", "seed"))
            if meant and now["step"] >= order.get("step", 1):
                obey(order)


def obey(order: dict[str, Any]) -> None:
    """Pace, or break the process in the way asked for."""
    match order["do"]:
        case "pace":
            time.sleep(order["s"])
        case "exit":
            os._exit(order["code"])
        case "signal":
            os.kill(os.getpid(), order["number"])
            time.sleep(5)
        case "kill_worker":
            os.kill(os.getppid(), 9)
            time.sleep(5)
        case "hang":
            time.sleep(3600)
        case "hang_holding_the_interpreter":
            import ctypes

            ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter's lock during the call
        case "hog":
            hoard = []
            while True:
                hoard.append(bytearray(os.urandom(2**20) * 8))
        case "leave_children":
            leave_children(order["count"])


def leave_children(count: int) -> None:
    """Double-forked children that outlive whoever made them, in the group and out of it; once a process."""
    if now.pop("left", None) is None:
        for number in range(count):
            child = os.fork()
            if child == 0:
                if number % 2:
                    os.setsid()
                if os.fork() == 0:
                    for descriptor in range(256):
                        with suppress(OSError):
                            os.close(descriptor)
                    os.execvp("sleep", ["sleep", "86.4"])
                os._exit(0)
            os.waitpid(child, 0)
    now["left"] = True


class Hook(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Runs `after[name]` once the module of that name has been imported."""

    def __init__(self) -> None:
        self.after = {"worker.training.words": remember_specs, "worker.training.loop": watch_steps}
        self.inner: dict[str, Any] = {}

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name not in self.after or name in self.inner:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None:
            self.inner[name] = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self.inner[spec.name].create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.inner[module.__name__].exec_module(module)
        self.after[module.__name__](module)


def remember_specs(words: Any) -> None:
    """Know which job is trained."""
    read = words.TrainSpec.model_validate_json

    def reading(line: bytes, **options: Any) -> Any:
        spec = read(line, **options)
        now.update(job=spec.job_id, attempt=spec.attempt, seed=spec.seed, step=0)
        now.pop("left", None)
        return spec

    words.TrainSpec.model_validate_json = reading


def watch_steps(_loop: Any) -> None:
    """See every step of every optimizer."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(note_step)


if FOLDER and "worker.training" in sys.orig_argv:
    sys.meta_path.insert(0, Hook())
