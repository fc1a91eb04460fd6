"""LoRA adapters of one base model: read in the background, held within a budget, put into slots when used.

Two tiers. Read adapters lie whole in memory up to a budget in bytes; the least recently used leave first.
Those of running rows are also in slots of the layers (`lora.py`), where a forward pass finds them side by
side. A side thread reads and checks files, so no running answer waits for a disk. Knows folders and layers,
nothing of requests, queues or text.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import nn

from app.core.completions import TunedWeights
from worker.serving.adapter_files import Adapter, read_adapter, weights_size_bytes
from worker.serving.lora import LoraLayer, Place, Route, Stack

BASE = "__base__"  # a row without an adapter


class AdapterSet:
    """The adapters of one model. Only the engine's thread calls it.

    `budget_bytes`: of adapters read into memory; one always fits. `max_slots`: adapters that rows of one
    batch may use at once. `on_read`: called from another thread when an adapter has been read.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget_bytes: int,
        max_slots: int,
        on_read: Callable[[], None] = lambda: None,
    ) -> None:
        self._layers = Layers(model, max_slots=max_slots)
        self._budget_bytes = budget_bytes
        self._on_read = on_read
        self._read: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._reading: dict[str, tuple[Future[Adapter], int]] = {}
        self._users: Counter[str] = Counter()
        self._reader: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self._read)

    @property
    def size_bytes(self) -> int:
        """Of adapters in memory, and of those being read."""
        held = sum(adapter.size_bytes for adapter in self._read.values())
        return held + sum(size for _, size in self._reading.values())

    def acquire(self, tuned: TunedWeights | None) -> str | None:
        """Name of the adapter, in a slot and kept until `release`; None if it is not there yet: ask again.

        Raises ModelUnavailable when the folder is missing, damaged or of an unsupported kind.
        """
        if tuned is None:
            return BASE
        if not self.load(tuned):
            return None
        name = adapter_name(tuned.id)
        self._layers.place(name, self._read[name], in_use=self._users)
        self._users[name] += 1
        return name

    def release(self, name: str | None) -> None:
        """Give back what `acquire` returned; the adapter stays loaded until its place is needed."""
        if name is not None and name != BASE:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]

    def load(self, tuned: TunedWeights) -> bool:
        """Whether it is in memory; else reading begins as soon as there is room. Raises ModelUnavailable."""
        name = adapter_name(tuned.id)
        if name not in self._read and not self._take_in(name):
            self._begin(name, Path(tuned.path))
            return False
        self._read.move_to_end(name)
        return True

    def is_being_read(self, tuned: TunedWeights) -> bool:
        """It will be here soon, whatever the others do."""
        return adapter_name(tuned.id) in self._reading

    def route(self, names: list[str], *, one_token: bool) -> None:
        """Say which adapter each row of the coming forward passes uses, and whether each adds one token."""
        self._layers.route(names, one_token=one_token)

    def close(self) -> None:
        """Wait for the side thread to end."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def _begin(self, name: str, folder: Path) -> None:
        """Start to read, unless it is on its way or there is no room now."""
        if name in self._reading:
            return
        size_bytes = weights_size_bytes(folder)
        if not self._make_room(size_bytes):
            return
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        future = self._reader.submit(read_adapter, folder, sizes=self._layers.sizes, like=self._layers.like)
        self._reading[name] = (future, size_bytes)
        future.add_done_callback(lambda _: self._on_read())

    def _take_in(self, name: str) -> bool:
        """Put what has been read in its place; False if it has not."""
        future, _ = self._reading.get(name, (None, 0))
        if future is None or not future.done():
            return False
        del self._reading[name]
        adapter = future.result()
        self._make_room(adapter.size_bytes)  # another number type than the file's takes another size
        self._read[name] = adapter
        return True

    def _make_room(self, size_bytes: int) -> bool:
        while (self._read or self._reading) and self.size_bytes + size_bytes > self._budget_bytes:
            idle = next((name for name in self._read if name not in self._users), None)
            if idle is None:
                self._collect()
                idle = next((name for name in self._read if name not in self._users), None)
            if idle is None:
                return False
            del self._read[idle]
            self._layers.forget(idle)
        return True

    def _collect(self) -> None:
        """Drop what was read for somebody who has gone since; nobody would ask for it again."""
        for name, (future, _) in list(self._reading.items()):
            if future.done():
                del self._reading[name]


class Layers:
    """The model's linear layers and the slots in them; a layer is wrapped when first an adapter needs it."""

    def __init__(self, model: nn.Module, *, max_slots: int) -> None:
        parameter = next(model.parameters())
        self.like = parameter.new_empty(0)  # device and number type of adapters
        self.sizes = {name: size for name, module in model.named_modules() if (size := _sizes(module))}
        self._model = model
        self._max_slots = max_slots
        self._route = Route(parameter.device)
        self._wrapped: dict[str, LoraLayer] = {}
        self._places: OrderedDict[str, Place] = OrderedDict()  # least recently placed first

    def place(self, name: str, adapter: Adapter, *, in_use: Counter[str]) -> None:
        """Make sure the adapter is in a slot, in place of one that no row uses."""
        if name in self._places:
            self._places.move_to_end(name)
            return
        place = Place(adapter.bucket, self._free_slot(adapter.bucket, in_use))
        for path, size in self.sizes.items():
            factors = adapter.factors.get(path)
            layer = self._wrapped.get(path)
            if factors is not None:
                layer = layer or self._wrap(path, size)
                if place.bucket not in layer.stacks:
                    layer.stacks[place.bucket] = Stack(
                        self._max_slots, place.bucket, sizes=size, like=self.like
                    )
            if layer is not None and place.bucket in layer.stacks:
                layer.stacks[place.bucket].write(place.slot, factors)
        self._places[name] = place

    def forget(self, name: str) -> None:
        """Its slot may be taken by another."""
        self._places.pop(name, None)

    def route(self, names: list[str], *, one_token: bool) -> None:
        """Which adapter each row uses."""
        self._route.set([self._places.get(name) for name in names], one_token=one_token)

    def unwrap(self) -> None:
        """Give the model its own layers back."""
        for path, layer in self._wrapped.items():
            self._model.set_submodule(path, layer.base)
        self._wrapped.clear()
        self._places.clear()

    def _free_slot(self, bucket: int, in_use: Counter[str]) -> int:
        """The lowest slot without an adapter, else that of the one unused for longest.

        A batch has no more rows than there are slots, so there is always one.
        """
        taken = {place.slot for place in self._places.values() if place.bucket == bucket}
        free = next((slot for slot in range(self._max_slots) if slot not in taken), None)
        if free is not None:
            return free
        idle = next(
            name for name, place in self._places.items() if place.bucket == bucket and name not in in_use
        )
        return self._places.pop(idle).slot

    def _wrap(self, path: str, sizes: tuple[int, int]) -> LoraLayer:
        parent_path, _, name = path.rpartition(".")
        parent = self._model.get_submodule(parent_path)
        layer = LoraLayer(getattr(parent, name), self._route, sizes=sizes)
        setattr(parent, name, layer)
        self._wrapped[path] = layer
        return layer


def adapter_name(tuned_id: str) -> str:
    """A short name, the same for the same id and different for all others."""
    return hashlib.sha256(tuned_id.encode()).hexdigest()[:24]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Inputs and outputs of a linear layer of any make; None for other modules."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None
