"""A real inference worker process: requests in through the broker, words out through a stream."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from app.core import presence
from app.core.completions import (
    CompletionRequest,
    Delta,
    Failed,
    Finished,
    Sampling,
    TunedWeights,
    WeightsKind,
    Word,
)
from app.core.queue import Queue, Sender, Task, inference_queue, make_celery
from app.core.redis_client import make_redis
from app.core.settings import Settings
from app.core.token_stream import CANCELS, decode, reply_stream
from tests.worker.desk import wait_for

ROOT = Path(__file__).parents[2]
STREAM = reply_stream("tests")
START = "from worker.main import run; from app.core.settings import get_settings; run(get_settings(), '{}')"


class Client:
    """What the API does: sends requests, reads words."""

    def __init__(self, client: redis.Redis, sender: Sender) -> None:
        self.redis = client
        self.sender = sender

    def ask(self, request_id: str, *, base_model: str = "tiny", **changes: Any) -> None:
        fields: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Where is my order?"}],
            "sampling": Sampling(max_tokens=5, temperature=0),
            "reply_to": STREAM,
            "expires_at": time.time() + 30,
        }
        request = CompletionRequest(
            id=request_id, project_id="p", base_model=base_model, **(fields | changes)
        )
        self.sender.send(Task.COMPLETE, inference_queue(base_model), request.model_dump(mode="json"))

    def words(self, request_id: str) -> list[Word]:
        entries = [decode(fields) for _, fields in self.redis.xrange(STREAM)]  # type: ignore[union-attr]
        return [word for entry in entries if entry.request_id == request_id for word in entry.words]

    def answer(self, request_id: str, *, choices: int = 1) -> list[Word]:
        def over() -> bool:
            ends = [word for word in self.words(request_id) if not isinstance(word, Delta)]
            return len(ends) == choices or any(isinstance(word, Failed) for word in ends)

        wait_for(over)
        return self.words(request_id)


@pytest.fixture(scope="module")
def start_worker(
    models_file: Path, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], subprocess.Popen[bytes]]:
    def start() -> subprocess.Popen[bytes]:
        own = {
            "LUTHIER_REDIS_URL": redis_url,
            "LUTHIER_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",  # never asked
            "LUTHIER_DATA_DIR": str(tmp_path_factory.mktemp("inference")),
            "LUTHIER_MODELS_FILE": str(models_file),
            "LUTHIER_DRAIN_S": "0.5",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", START.format(Queue.INFERENCE)]
        return subprocess.Popen(command, env=os.environ | own, cwd=ROOT, start_new_session=True)

    return start


@pytest.fixture(scope="module")
def client(redis_url: str, start_worker: Callable[[], subprocess.Popen[bytes]]) -> Iterator[Client]:
    """A client of a worker that is ready."""
    connection = make_redis(redis_url)
    connection.flushall()
    worker = start_worker()
    try:
        wait_for(lambda: presence.list_present(connection, kind="inference"), timeout_s=120)
        yield Client(connection, Sender(make_celery(Settings(redis_url=redis_url))))
    finally:
        worker.terminate()
        assert worker.wait(timeout=20) == 0
        connection.close()


def test_a_ready_worker_names_the_models_whose_weights_it_has(client: Client) -> None:
    assert presence.list_present(client.redis, kind="inference") == [{"base_models": ["tiny"]}]


def test_a_request_is_answered_in_words_with_exact_counts(client: Client) -> None:
    client.ask("r1")
    *deltas, last = client.answer("r1")
    assert all(isinstance(word, Delta) and word.text for word in deltas)
    assert isinstance(last, Finished)
    assert last.completion_tokens <= 5
    assert last.prompt_tokens > 0


def test_each_of_n_choices_ends(client: Client) -> None:
    client.ask("n3", sampling=Sampling(max_tokens=3, n=3, seed=1))
    ends = [word for word in client.answer("n3", choices=3) if isinstance(word, Finished)]
    assert sorted(end.index for end in ends) == [0, 1, 2]


def test_requests_at_the_same_time_are_all_answered(client: Client) -> None:
    for number in range(12):
        client.ask(f"many{number}")
    texts = {str([word.model_dump() for word in client.answer(f"many{number}")]) for number in range(12)}
    assert len({text.count("finished") for text in texts}) == 1


def test_tuned_weights_that_are_not_there_fail_with_503(client: Client) -> None:
    tuned = TunedWeights(id="w", kind=WeightsKind.LORA, path="/nowhere")
    client.ask("gone", tuned=tuned)
    [failed] = client.answer("gone")
    assert isinstance(failed, Failed)
    assert failed.status == 503
    assert "/nowhere" not in failed.message


def test_a_base_model_whose_weights_are_missing_fails_with_503(client: Client) -> None:
    client.ask("gone2", base_model="gone")
    [failed] = client.answer("gone2")
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (503, "model_not_loaded")


def test_a_request_past_its_time_or_not_a_request_is_dropped(client: Client) -> None:
    client.ask("late", expires_at=time.time() - 1)
    client.sender.send(Task.COMPLETE, inference_queue("tiny"), {"nonsense": "x"})
    client.sender.send(Task.COMPLETE, inference_queue("tiny"))
    client.ask("after")
    client.answer("after")
    assert client.words("late") == []


def test_a_client_that_leaves_gets_no_more_words(client: Client) -> None:
    client.ask("left", sampling=Sampling(max_tokens=400, temperature=1.5, seed=3))
    wait_for(lambda: client.words("left"))
    client.redis.publish(CANCELS, "left")
    time.sleep(0.3)
    count = len(client.words("left"))
    time.sleep(0.3)
    words = client.words("left")
    assert len(words) == count
    if not any(isinstance(word, Finished) for word in words):
        client.ask("next")
        assert isinstance(client.answer("next")[-1], Finished)


def test_a_cancel_that_overtakes_its_request_is_heeded(client: Client) -> None:
    client.redis.publish(CANCELS, "early")
    time.sleep(0.3)
    client.ask("early")
    client.ask("later")
    client.answer("later")
    time.sleep(0.2)
    assert client.words("early") == []


def test_a_worker_told_to_stop_ends_what_runs_with_a_word_and_leaves_soon(
    client: Client, start_worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    worker = start_worker()
    wait_for(lambda: len(presence.list_present(client.redis, kind="inference")) == 2, timeout_s=120)
    for number in range(6):
        client.ask(f"stop{number}", sampling=Sampling(max_tokens=300, temperature=1.5))
    wait_for(lambda: client.words("stop0"))
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=20) == 0
    assert time.monotonic() - began < 15
    assert len(presence.list_present(client.redis, kind="inference")) == 1
    for number in range(6):
        client.answer(f"stop{number}")
