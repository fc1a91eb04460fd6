"""A stand-in for the inference worker: takes real messages from the real queue, answers with given words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from kombu.connection import Connection

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import CompletionRequest, Delta, Finished, FinishReason, Word
from app.core.presence import announce, withdraw
from app.core.queue import inference_queue
from app.core.redis_client import make_redis
from app.core.token_stream import CANCELS, WordWriter, publish_entries

Script = Callable[[CompletionRequest], Sequence[Sequence[Word]]]


def says(*texts: str, prompt_tokens: int = 7, reason: FinishReason = FinishReason.STOP) -> Script:
    """Every choice says these texts, one entry for each."""

    def script(request: CompletionRequest) -> list[list[Word]]:
        n = request.sampling.n
        entries: list[list[Word]] = [[Delta(index=i, text=text) for i in range(n)] for text in texts]
        tokens = len(texts)
        entries += [
            [Finished(index=i, reason=reason, prompt_tokens=prompt_tokens, completion_tokens=tokens)]
            for i in range(n)
        ]
        return entries

    return script


class InferenceWorker:
    """Takes one message at a time; `requests` and `cancels` tell what it saw."""

    def __init__(self, redis_url: str) -> None:
        self.script: Script = says("Hello", " world")
        self.requests: list[CompletionRequest] = []
        self.cancels: list[str] = []
        self.client: redis.Redis = make_redis(redis_url)
        self._writers: dict[str, WordWriter] = {}
        self._url = redis_url
        self._stop = threading.Event()

    @contextmanager
    def present(self) -> Iterator[InferenceWorker]:
        """Say that the worker is there, with nothing seen yet, for as long as the block lasts."""
        self.script = says("Hello", " world")
        self.requests, self.cancels = [], []
        about = {"base_models": [DEFAULT_BASE_MODEL]}
        announce(self.client, kind="inference", worker="stand-in", about=about, ttl_s=60)
        try:
            yield self
        finally:
            withdraw(self.client, kind="inference", worker="stand-in")

    def answer(self, request: CompletionRequest, words: Sequence[Word]) -> None:
        """Publish some words now."""
        if request.id not in self._writers:
            writer = WordWriter(reply_to=request.reply_to, request_id=request.id)
            self._writers[request.id] = writer
        publish_entries(self.client, [self._writers[request.id].entry(words)])

    def run(self) -> None:
        """Take messages until stopped."""
        with Connection(self._url) as connection:  # type: ignore[no-untyped-call]
            queue = connection.SimpleQueue(inference_queue(DEFAULT_BASE_MODEL), no_ack=True)
            while not self._stop.is_set():
                try:
                    message = queue.get(timeout=0.05)
                except queue.Empty:
                    continue
                request = CompletionRequest.model_validate(message.payload[0][0])
                self.requests.append(request)
                for words in self.script(request):
                    self.answer(request, words)
            queue.close()

    def listen(self) -> None:
        """Note cancels until stopped."""
        with self.client.pubsub(ignore_subscribe_messages=True) as channel:  # type: ignore[no-untyped-call]
            channel.subscribe(CANCELS)
            while not self._stop.is_set():
                message: dict[str, Any] | None = channel.get_message(timeout=0.05)
                if message:
                    self.cancels.append(message["data"].decode())

    def stop(self) -> None:
        """End both loops."""
        self._stop.set()


@contextmanager
def inference_worker(redis_url: str) -> Iterator[InferenceWorker]:
    """A worker that takes messages while the block lasts; it is present only inside `present`."""
    worker = InferenceWorker(redis_url)
    threads = [threading.Thread(target=loop, daemon=True) for loop in (worker.run, worker.listen)]
    for thread in threads:
        thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        for thread in threads:
            thread.join(timeout=10)
        worker.client.close()
