"""The engines of one process by base model: loaded when first asked for, ended together.

Whoever asks for a model that runs waits for nobody; only those who ask for a model that is just being
loaded wait for that one. Knows names and engines, neither folders nor requests.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

from worker.serving.engine import Engine


class StoppedError(Exception):
    """No engine starts any more: this process is being stopped."""


class Engines:
    """Name → engine. Any thread may call it; `load` makes an engine that is not started yet."""

    def __init__(self, load: Callable[[str], Engine]) -> None:
        self._load = load
        self._lock = Lock()  # of the tables below; never held while a model loads
        self._loading: dict[str, Lock] = {}
        self._running: dict[str, Engine] = {}
        self._stopped = False

    def get(self, name: str) -> Engine | None:
        """The engine of that name if it was started, dead or alive."""
        return self._running.get(name)

    def open(self, name: str) -> Engine:
        """The engine of that name, loaded if need be; a dead one is not replaced.

        Raises StoppedError after `stop`, and whatever `load` raises.
        """
        engine = self._running.get(name)
        if engine is not None:
            return engine
        with self._lock:
            loading = self._loading.setdefault(name, Lock())
        with loading:
            if name not in self._running:
                self._start(name)
            return self._running[name]

    def dead(self, *, silent_s: float) -> list[str]:
        """Names of engines that ended without being told to, or made no step for so long."""
        with self._lock:
            if self._stopped:
                return []
            return [
                name
                for name, engine in self._running.items()
                if not engine.alive or engine.stats().seconds_since_turn > silent_s
            ]

    def stop(self) -> None:
        """End all engines. A model that is being loaded is not waited for: it never starts."""
        with self._lock:
            self._stopped = True
            engines = list(self._running.values())
        for engine in engines:
            engine.stop()

    def _start(self, name: str) -> None:
        if self._stopped:
            raise StoppedError
        engine = self._load(name)
        with self._lock:
            if self._stopped:
                raise StoppedError
            engine.start()
            self._running[name] = engine
