"""The serving engine: one thread that answers many requests together on one base model.

`submit`, `cancel`, `load_adapter` and `stats` may be called from any thread. Words go to the `emit` given
with each request, from the engine's thread. Knows neither HTTP nor queues nor where weights come from.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread

import torch

from app.core.completions import CompletionRequest, Failed, TunedWeights
from worker.base_model import load_base_model, load_tokenizer, pick_device
from worker.serving.adapter_files import ModelUnavailable
from worker.serving.batch import GroupLimits, ModelGroup
from worker.serving.intake import Intake
from worker.serving.loop import ENGINE_ERROR, Loop
from worker.serving.models import ModelSet
from worker.serving.outlet import Outlet
from worker.serving.rendering import Refused
from worker.serving.sequence import Emit

IDLE_S = 0.5  # how often an idle engine shows that it lives and looks for requests past their time
STOPPED = Failed(
    status=503, code="engine_stopped", message="The inference worker is shutting down. Please try again."
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """What one engine may hold at once."""

    max_batch: int = 16  # sequences computed together
    kv_bytes: int = 2**30  # keys and values of running rows, per model; each row is as long as the longest
    adapter_bytes: int = 2 * 2**30  # LoRA adapters in memory; those of running rows are there twice
    max_full_models: int = 1  # whole tuned models in memory beside the base
    prefix_bytes: int = 256 * 2**20  # keys and values of prompts' beginnings, per model
    prefill_tokens: int = 256  # prompt tokens between two decoding steps


@dataclass(frozen=True)
class EngineStats:
    """A look at the engine; counts are of this moment, totals since it began."""

    alive: bool
    seconds_since_turn: float  # of the loop; grows during one long prompt, else stays below a second
    running: int  # sequences in a batch
    waiting: int  # sequences in a line
    loading: int  # requests whose whole model is not in memory yet
    adapters: int  # in memory
    adapter_bytes: int  # of them, and of those being read
    full_models: int  # in memory
    kv_tokens: int  # held in rows
    kv_tokens_reserved: int  # memory taken for rows
    made_tokens: int  # total
    preemptions: int  # total
    errors: int  # total


class Engine:
    """Continuous batching over rows of one base model, its adapters and its whole tuned models."""

    def __init__(
        self,
        base_dir: str | Path,
        *,
        chat_template: str | None = None,
        limits: EngineLimits | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Load the base model. `dtype` None means what the device computes best (`compute_dtype`)."""
        self._limits = limits or EngineLimits()
        self._device = device or pick_device()
        self._dtype = dtype
        self._outlet = Outlet()
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = Lock()
        self._accepting = False
        self._stopping = False
        self._thread: Thread | None = None
        self._last_turn = time.monotonic()
        base = self._load_group(Path(base_dir))
        self._intake = Intake(
            load_tokenizer(base_dir),
            base.model,
            chat_template=chat_template,
            context_length=base.context_length,
        )
        models = ModelSet(
            base,
            load=self._load_group,
            max_full_models=self._limits.max_full_models,
            on_loaded=self._wake,
        )
        self._loop = Loop(self._intake, models, self._outlet, prefill_tokens=self._limits.prefill_tokens)
        self._stats = self._count()

    def start(self) -> None:
        """Begin to answer; an engine starts once."""
        self._accepting = True
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: CompletionRequest, emit: Emit) -> None:
        """Queue a request and return. Its words end with a Finished per choice or one Failed.

        A second request with the id of an open one is ignored. On an engine that is not alive the Failed
        comes at once, from the caller's thread.
        """
        if not self._outlet.open(request.id, emit):
            _log.warning("request %s is open already; its second message is ignored", request.id)
            return
        try:
            self._intake.prepare(request)
        except Refused as refused:
            self._outlet.fail(request.id, refused.failed)
            return
        if not self._put(partial(self._loop.open, request)):
            self._outlet.fail(request.id, STOPPED if self._stopping else ENGINE_ERROR)

    def cancel(self, request_id: str) -> None:
        """Nobody waits for this request any more: no further words, rows free within a step."""
        self._outlet.close(request_id)
        self._put(partial(self._loop.drop, request_id))

    def load_adapter(self, tuned: TunedWeights) -> Future[None]:
        """Load tuned weights ahead of their first request; the future fails with ModelUnavailable."""
        done: Future[None] = Future()
        if not self._put(partial(self._loop.warm_up, tuned, done)):
            done.set_exception(ModelUnavailable("the engine does not run"))
        return done

    def stats(self) -> EngineStats:
        """Figures as of the last step."""
        age_s = time.monotonic() - self._last_turn
        return replace(self._stats, alive=self.alive, seconds_since_turn=age_s)

    @property
    def alive(self) -> bool:
        """The loop runs and takes requests."""
        return self._accepting and self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the loop within a step; open requests get their Failed. Returns when the thread is gone."""
        self._stopping = True
        self._wake()
        if self._thread is not None:
            self._thread.join()

    def _wake(self) -> None:
        """A loop that waits for something looks again."""
        self._inbox.put(_nothing)

    def _put(self, command: Callable[[], None]) -> bool:
        with self._lock:
            if self._accepting:
                self._inbox.put(command)
            return self._accepting

    def _run(self) -> None:
        last_word = STOPPED
        try:
            with torch.inference_mode():
                while not self._stopping:
                    self._turn()
        except BaseException:
            _log.exception("the inference engine is dead")
            last_word = ENGINE_ERROR
        self._close(last_word)

    def _turn(self) -> None:
        wait_s = 0.0 if self._loop.busy else IDLE_S
        try:
            self._inbox.get(timeout=wait_s)() if wait_s else None
            while True:
                self._inbox.get_nowait()()
        except Empty:
            pass
        self._loop.step()
        self._stats = self._count()
        self._last_turn = time.monotonic()

    def _close(self, last_word: Failed) -> None:
        """Refuse what comes from now on, then end what is open. Commands left behind still take effect."""
        with self._lock:
            self._accepting = False
        while not self._inbox.empty():
            self._inbox.get_nowait()()
        self._outlet.fail_all(last_word)
        self._loop.close()

    def _count(self) -> EngineStats:
        groups = self._loop.models.groups
        return EngineStats(
            alive=True,
            seconds_since_turn=0.0,
            running=sum(len(group.cache.lengths) for group in groups),
            waiting=sum(len(group.queue) for group in groups),
            loading=self._loop.loading,
            adapters=len(groups[0].adapters),
            adapter_bytes=groups[0].adapters.size_bytes,
            full_models=len(groups) - 1,
            kv_tokens=sum(sum(group.cache.lengths) for group in groups),
            kv_tokens_reserved=sum(group.cache.capacity for group in groups),
            made_tokens=self._loop.made_tokens,
            preemptions=sum(group.preemptions for group in groups),
            errors=self._loop.errors,
        )

    def _load_group(self, folder: Path) -> ModelGroup:
        model = load_base_model(folder, quantize_4bit=False, device=self._device, dtype=self._dtype)
        limits = GroupLimits(
            max_batch=self._limits.max_batch,
            kv_bytes=self._limits.kv_bytes,
            adapter_bytes=self._limits.adapter_bytes,
            prefix_bytes=self._limits.prefix_bytes,
        )
        return ModelGroup(model, limits, on_read=self._wake)


def _nothing() -> None:
    """What the inbox holds when there is only to wake up."""
