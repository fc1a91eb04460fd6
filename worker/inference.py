"""What the inference worker does: one engine per base model, requests in by queue, words out by Redis."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import redis

from app.core.base_models import BaseModelEntry, find_model_dir
from app.core.completions import CompletionRequest, Failed, Finished, Word
from app.core.token_stream import CANCELS, WordWriter
from worker.context import Context
from worker.serving.engine import Engine, EngineLimits

log = logging.getLogger(__name__)
_LONGEST_WAIT_S = 3600.0  # a request held longer than this is a bug; its thread must come free


class Inference:
    """The engines of this process and the requests they are busy with."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._writer = WordWriter(context.redis)
        self._engines: dict[str, Engine] = {}
        self._lock = threading.Lock()
        self._running: dict[str, tuple[Engine, threading.Event]] = {}

    def entries(self) -> list[BaseModelEntry]:
        """The base models this worker is told to serve, whether their weights are here or not."""
        asked = self._context.settings.served_base_models
        entries = self._context.catalogue.entries.values()
        return [entry for entry in entries if not asked or entry.name in asked]

    def available(self) -> list[str]:
        """Names of base models that can answer now: weights here, engine alive or not started yet."""
        names = []
        for entry in self.entries():
            engine = self._engines.get(entry.name)
            if self._folder(entry) is not None and (engine is None or engine.alive):
                names.append(entry.name)
        return names

    def preload(self) -> None:
        """Load what the operator named, or the only model there is, so that no user waits for it."""
        ready = [entry.name for entry in self.entries() if self._folder(entry) is not None]
        if len(ready) == 1 or self._context.settings.served_base_models:
            for name in ready:
                self._engine(name)

    def complete(self, payload: dict[str, Any]) -> None:
        """Answer one request; returns when its last word is said or nobody listens any more."""
        request = CompletionRequest.model_validate(payload)
        done = threading.Event()
        if request.expires_at < time.time():
            return  # the API has answered 503 already
        try:
            engine = self._engine(request.base_model)
        except Exception:  # whatever keeps a model from loading, the one who asked must hear of it
            log.exception("engine of %s did not start", request.base_model)
            self._say(request, [_unavailable(request.base_model)])
            return
        self._running[request.id] = (engine, done)
        try:
            engine.submit(request, self._emitter(request, done))
            if not done.wait(_LONGEST_WAIT_S):
                engine.cancel(request.id)
        finally:
            del self._running[request.id]

    def listen_for_cancels(self) -> None:
        """Drop requests whose client has gone; returns when the connection is lost."""
        with self._context.redis.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            pubsub.subscribe(CANCELS)
            while True:
                message = pubsub.get_message(timeout=5.0)
                if message is not None:
                    self._cancel(message["data"].decode())

    def stop(self) -> None:
        """End all engines; what still ran hears so."""
        for engine in self._engines.values():
            engine.stop()

    def _cancel(self, request_id: str) -> None:
        running = self._running.get(request_id)
        if running is not None:
            engine, done = running
            engine.cancel(request_id)
            done.set()

    def _engine(self, name: str) -> Engine:
        with self._lock:
            engine = self._engines.get(name)
            if engine is None or not engine.alive:
                entry = self._context.catalogue.find(name)
                folder = None if entry is None else self._folder(entry)
                if entry is None or folder is None:
                    raise FileNotFoundError(f"weights of {name}")
                settings = self._context.settings
                limits = EngineLimits(
                    max_batch=settings.max_batch,
                    max_tokens_in_flight=settings.max_tokens_in_flight,
                    max_adapters=settings.max_adapters,
                )
                engine = Engine(folder, chat_template=entry.chat_template, limits=limits)
                engine.start()
                self._engines[name] = engine
                log.info("engine of %s started", name)
            return engine

    def _folder(self, entry: BaseModelEntry) -> Any:
        return find_model_dir(entry, self._context.settings.models_dir)

    def _emitter(self, request: CompletionRequest, done: threading.Event) -> Callable[[list[Word]], None]:
        left = request.sampling.n

        def emit(words: list[Word]) -> None:
            nonlocal left
            self._say(request, words)
            left -= sum(isinstance(word, Finished) for word in words)
            if left <= 0 or any(isinstance(word, Failed) for word in words):
                done.set()

        return emit

    def _say(self, request: CompletionRequest, words: list[Word]) -> None:
        try:
            self._writer.publish(request.reply_to, request.id, words)
        except redis.RedisError as error:
            # The API notices the silence and answers for us; the engine's loop must not stop for this.
            log.warning("words of %s lost: %s", request.id, type(error).__name__)


def _unavailable(base_model: str) -> Failed:
    text = f"The model {base_model} could not be loaded. Try again later, or tell the operator."
    return Failed(status=503, code="model_not_loaded", message=text)
