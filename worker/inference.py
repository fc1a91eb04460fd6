"""What the inference worker does: one engine per base model, requests in by queue, words out by Redis."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
import torch
from pydantic import ValidationError

from app.core import presence
from app.core.base_models import BaseModelEntry, find_model_dir
from app.core.completions import (
    CompletionRequest,
    Failed,
    Finished,
    TunedWeights,
    WeightsKind,
    Word,
)
from app.core.manifest import MANIFEST
from app.core.new_weights import NEW_WEIGHTS, NewWeights
from app.core.queue import Queue
from app.core.token_stream import CANCELS, WordPost, WordWriter
from worker.context import Context
from worker.serving.adapter_files import ModelUnavailable
from worker.serving.engine import STOPPED, Engine, EngineLimits
from worker.serving.engines import Engines, StoppedError
from worker.serving.loop import ENGINE_ERROR, unavailable
from worker.serving.sequence import Emit

log = logging.getLogger(__name__)
_LONGEST_WAIT_S = 3600.0  # a request held longer than this is a bug; its thread must come free
_LAST_WORDS_S = 5.0  # how long words may take to leave a process that ends
_HUNG_S = 30.0  # an engine that made no step for so long is announced no more; a long prompt takes less
_LOST_S = 300.0  # and for so long: it never will again
_BROKEN = 70  # exit code, EX_SOFTWARE of sysexits.h: an engine has died
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}
_REMEMBERED = 1000  # cancelled ids: a cancel may overtake its request, which still waits in the queue


@dataclass(slots=True)
class _Held:
    """A request this process is busy with; `engine` is None while its model loads."""

    engine: Engine | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Inference:
    """The engines of this process and the requests they are busy with."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._engines = Engines(self._load)
        self._post = WordPost(context.redis)
        self._lock = threading.Lock()  # of the two tables below
        self._held: dict[str, _Held] = {}
        self._cancelled: OrderedDict[str, None] = OrderedDict()
        self._stopping = threading.Event()
        self._stopped = threading.Event()

    def entries(self) -> list[BaseModelEntry]:
        """The base models this worker is told to serve, whether their weights are here or not."""
        asked = self._context.settings.served_base_models
        entries = self._context.catalogue.entries.values()
        return [entry for entry in entries if not asked or entry.name in asked]

    def available(self) -> list[str]:
        """Names of base models that can answer now: weights here, engine at work or not started yet."""
        names: list[str] = []
        if self._stopping.is_set():
            return names
        for entry in self.entries():
            engine = self._engines.get(entry.name)
            works = engine is None or (engine.alive and engine.stats().seconds_since_turn < _HUNG_S)
            if works and self._folder(entry) is not None:
                names.append(entry.name)
        return names

    def preload(self) -> None:
        """Load what the operator named, or the only model there is, so that no user waits for it."""
        ready = [entry.name for entry in self.entries() if self._folder(entry) is not None]
        if len(ready) == 1 or self._context.settings.served_base_models:
            for name in ready:
                try:
                    self._engines.open(name)
                except Exception:  # one broken folder must not keep the other models from answering
                    log.exception("engine of %s did not start", name)

    def complete(self, payload: dict[str, Any]) -> None:
        """Answer one request; returns when its last word is said or nobody listens any more."""
        try:
            request = CompletionRequest.model_validate(payload)
        except ValidationError as error:  # its text would carry the user's messages into the log
            log.error("a request of another version: %d faults", error.error_count())
            return
        if request.expires_at < time.time():
            return  # the API has answered 503 already
        held = _Held()
        with self._lock:
            if request.id in self._held or request.id in self._cancelled:
                return
            self._held[request.id] = held
        try:
            self._answer(request, held)
        finally:
            with self._lock:
                del self._held[request.id]

    def listen(self) -> None:
        """Drop requests whose client has gone, load new weights ahead of their first request.

        Returns when the connection is lost or this worker stops.
        """
        with self._context.redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(CANCELS, NEW_WEIGHTS)
            while not self._stopped.is_set():
                message = pubsub.get_message(timeout=1.0)
                if message is None:
                    continue
                if message["channel"].decode() == CANCELS:
                    self._cancel(message["data"].decode("utf-8", "replace"))
                else:
                    self._load_ahead(message["data"])

    def end_if_broken(self) -> None:
        """End this process when an engine has died or hangs for good: a CUDA error never leaves a process.

        Whoever started this one starts another. What runs on other engines hears that it was stopped.
        """
        names = self._engines.dead(silent_s=_LOST_S)
        if not names:
            return
        log.critical("engine of %s is dead; this process ends", ", ".join(names))
        self._stopping.set()
        with suppress(redis.RedisError):  # then the entry ends by itself
            presence.withdraw(self._context.redis, kind=Queue.INFERENCE, worker=self._context.worker)
        last_words = threading.Thread(target=self.stop, name="last-words", daemon=True)
        last_words.start()
        last_words.join(_LAST_WORDS_S)  # a broken device may hold the other engines for good
        os._exit(_BROKEN)  # no thread of this process can be trusted to end

    def stop_soon(self, *, drain_s: float) -> None:
        """Take no new requests; what runs may end within the time, the rest hears that it was stopped."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        timer = threading.Timer(drain_s, self.stop)
        timer.daemon = True
        timer.start()

    def stop(self) -> None:
        """End all engines; what still ran hears so, and the last words are out."""
        self._stopping.set()
        self._stopped.set()
        self._engines.stop()
        self._post.flush(timeout_s=_LAST_WORDS_S)

    def _answer(self, request: CompletionRequest, held: _Held) -> None:
        emit = self._emitter(request, held.done)
        engine = held.engine = self._find_engine(request, emit)
        if engine is None:
            return
        try:
            engine.submit(self._with_folder(request), emit)
        except ModelUnavailable as error:
            log.error("weights of request %s: %s", request.id, error)
            emit([unavailable(error)])
            return
        except Exception:  # whatever it is, the one who asked must hear of it
            log.exception("request %s could not be submitted", request.id)
            emit([ENGINE_ERROR])
            return
        held.done.wait(_LONGEST_WAIT_S)
        engine.cancel(request.id)  # the client may have gone before the engine knew of its request

    def _find_engine(self, request: CompletionRequest, emit: Emit) -> Engine | None:
        """The engine for a request; None once the one who asked has heard that there is none."""
        try:
            if self._stopping.is_set():
                raise StoppedError
            return self._engines.open(request.base_model)
        except StoppedError:
            emit([STOPPED])
        except Exception:  # whatever keeps a model from answering
            log.exception("engine of %s did not start", request.base_model)
            emit([_not_loaded(request.base_model)])
        return None

    def _with_folder(self, request: CompletionRequest) -> CompletionRequest:
        """The request with its weights' key in storage replaced by the folder. Raises ModelUnavailable."""
        if request.tuned is None:
            return request
        return request.model_copy(update={"tuned": self._in_storage(request.tuned)})

    def _in_storage(self, tuned: TunedWeights) -> TunedWeights:
        try:
            folder = self._context.storage.path(tuned.path)
        except ValueError:  # what came by Redis must not choose folders
            raise ModelUnavailable("its place in storage is not known") from None
        if not (folder / MANIFEST).exists():  # also when a copy is in memory: what is deleted answers no more
            raise ModelUnavailable("its files are missing or damaged")
        return tuned.model_copy(update={"path": str(folder)})

    def _load_ahead(self, data: bytes) -> None:
        try:
            news = NewWeights.model_validate_json(data)
            engine = self._engines.get(news.base_model)
            if engine is not None and news.tuned.kind is WeightsKind.LORA:  # a whole one drives another out
                engine.load_adapter(self._in_storage(news.tuned))
        except (ValidationError, ModelUnavailable) as error:  # the first request for them will tell
            log.warning("new weights not loaded ahead: %s", type(error).__name__)

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            self._cancelled[request_id] = None
            if len(self._cancelled) > _REMEMBERED:
                self._cancelled.popitem(last=False)
            held = self._held.get(request_id)
        if held is not None:
            held.done.set()
            if held.engine is not None:
                held.engine.cancel(request_id)

    def _load(self, name: str) -> Engine:
        entry = self._context.catalogue.find(name)
        folder = None if entry is None else self._folder(entry)
        if entry is None or folder is None:
            raise FileNotFoundError(f"weights of {name}")
        settings = self._context.settings
        limits = EngineLimits(
            max_batch=settings.max_batch,
            kv_bytes=settings.kv_cache_mb * 10**6,
            prefill_tokens=settings.prefill_tokens,
            prefix_bytes=settings.prefix_cache_mb * 10**6,
            adapter_bytes=settings.adapter_memory_mb * 10**6,
        )
        dtype = _DTYPES[settings.inference_dtype]
        engine = Engine(folder, chat_template=entry.chat_template, limits=limits, dtype=dtype)
        log.info("engine of %s loaded", name)
        return engine

    def _folder(self, entry: BaseModelEntry) -> Path | None:
        return find_model_dir(entry, self._context.settings.models_dir)

    def _emitter(self, request: CompletionRequest, done: threading.Event) -> Emit:
        writer = WordWriter(reply_to=request.reply_to, request_id=request.id)
        left = request.sampling.n

        def emit(words: list[Word]) -> None:
            nonlocal left
            self._post.put(writer.entry(words))
            left -= sum(isinstance(word, Finished) for word in words)
            if left <= 0 or any(isinstance(word, Failed) for word in words):
                done.set()

        return emit


def _not_loaded(base_model: str) -> Failed:
    text = f"The model {base_model} could not be loaded. Try again later, or tell the operator."
    return Failed(status=503, code="model_not_loaded", message=text)
