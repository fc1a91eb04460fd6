"""The models of one engine: the base, and whole tuned models (`full`) that are loaded when asked for.

Whole models are read by a side thread, so that running answers do not wait for the disk; a few stay, and
the one unused for longest leaves first. Knows folders and memory, nothing of requests' words.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from app.core.completions import TunedWeights, WeightsKind
from worker.serving.adapter_files import ModelUnavailable, check_whole
from worker.serving.batch import ModelGroup

LoadGroup = Callable[[Path], ModelGroup]
_log = logging.getLogger(__name__)


class ModelSet:
    """The base and up to `max_full_models` whole models. Only the engine's thread calls it."""

    def __init__(
        self, base: ModelGroup, *, load: LoadGroup, max_full_models: int, on_loaded: Callable[[], None]
    ) -> None:
        self.base = base
        self._load = load
        self._max_full_models = max_full_models
        self._on_loaded = on_loaded
        self._full: OrderedDict[str, ModelGroup] = OrderedDict()  # least recently asked for first
        self._loading: dict[str, Future[ModelGroup]] = {}
        self._failed: dict[str, ModelUnavailable] = {}  # since the last `settle`
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="full-models")

    @property
    def groups(self) -> list[ModelGroup]:
        """All models in memory, the base first."""
        return [self.base, *self._full.values()]

    def settle(self) -> None:
        """Take in what has been read, whether anybody still waits for it or not; once before each round.

        Who waits for weights that turned out to be unreadable hears of it in this round.
        """
        self._failed = {}
        for id in [id for id, future in self._loading.items() if future.done()]:
            try:
                self._full[id] = self._loading.pop(id).result()
            except ModelUnavailable as error:
                self._failed[id] = error

    def get(self, tuned: TunedWeights | None) -> ModelGroup | None:
        """The model that answers for `tuned`; None while it is on its way or has no place: ask again.

        Raises ModelUnavailable when it cannot be loaded.
        """
        if tuned is None or tuned.kind is WeightsKind.LORA:
            return self.base
        if tuned.id in self._failed:
            raise self._failed[tuned.id]
        group = self._full.get(tuned.id)
        if group is None:
            self._begin_loading(tuned)
            return None
        self._full.move_to_end(tuned.id)
        return group

    def close(self) -> None:
        """Wait for the side threads to end."""
        self.base.adapters.close()
        self._reader.shutdown(cancel_futures=True)

    def _begin_loading(self, tuned: TunedWeights) -> None:
        if tuned.id not in self._loading and self._make_place():
            self._loading[tuned.id] = self._reader.submit(self._read, Path(tuned.path))
            self._loading[tuned.id].add_done_callback(lambda _: self._on_loaded())

    def _read(self, folder: Path) -> ModelGroup:
        try:
            check_whole(folder)
            return self._load(folder)
        except ModelUnavailable:
            raise
        except Exception as error:
            _log.warning("model in %s cannot be loaded: %s", folder, error)
            raise ModelUnavailable("its files cannot be read") from error

    def _make_place(self) -> bool:
        while len(self._full) + len(self._loading) >= self._max_full_models:
            idle = next((id for id, group in self._full.items() if group.idle), None)
            if idle is None:
                return False
            del self._full[idle]
        return True
