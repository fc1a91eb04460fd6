"""A real inference worker process: requests in through the broker, words out through a stream."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from peft import LoraConfig, get_peft_model

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
from app.core.manifest import write_manifest
from app.core.new_weights import NewWeights, announce
from app.core.queue import Sender, Task, inference_queue, make_celery
from app.core.redis_client import make_redis
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.token_stream import CANCELS, decode, reply_stream
from tests.serving.conftest import quiet_peft
from tests.tiny import build_tiny_model
from tests.worker.desk import wait_for
from worker.base_model import load_base_model

ROOT = Path(__file__).parents[2]
STREAM = reply_stream("tests")
START = """
from app.core.settings import get_settings
from worker.main import run

run(get_settings(), "inference")
"""
# A device that breaks for good at a given moment, as any forward pass on it would notice.
BREAKABLE = """
import os
from torch.nn.modules.module import register_module_forward_pre_hook

def fail(*_):
    if os.path.exists(os.environ["BROKEN_IF"]):
        raise RuntimeError("device-side assert")

register_module_forward_pre_hook(fail)
"""


# A device that hangs while a file is there, and a worker whose patience fits a test.
HANGABLE = """
import os, time
from torch.nn.modules.module import register_module_forward_pre_hook
import worker.inference

worker.inference._HUNG_S, worker.inference._LOST_S = 1.0, 6.0

def hang(*_):
    while os.path.exists(os.environ["HANGS_IF"]):
        time.sleep(0.05)

register_module_forward_pre_hook(hang)
"""


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
def storage(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Where the workers look for weights."""
    return Storage(Settings(data_dir=tmp_path_factory.mktemp("inference")).storage_dir)


@pytest.fixture(scope="module")
def start_worker(
    models_file: Path, redis_url: str, storage: Storage
) -> Callable[..., subprocess.Popen[bytes]]:
    """Starts the real process; `first` is run in it before all else."""

    def start(first: str = "", **environment: str) -> subprocess.Popen[bytes]:
        own = {
            "LUTHIER_REDIS_URL": redis_url,
            "LUTHIER_DATABASE_URL": "postgresql+psycopg://nobody@127.0.0.1:1/none",  # never asked
            "LUTHIER_DATA_DIR": str(storage.root.parent),
            "LUTHIER_MODELS_FILE": str(models_file),
            "LUTHIER_DRAIN_S": "0.5",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", first + START]
        return subprocess.Popen(command, env=os.environ | own | environment, cwd=ROOT, start_new_session=True)

    return start


@pytest.fixture(scope="module")
def client(redis_url: str, start_worker: Callable[..., subprocess.Popen[bytes]]) -> Iterator[Client]:
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


def test_weights_in_storage_are_found_below_the_workers_own_folder(
    client: Client, storage: Storage, models_file: Path
) -> None:
    folder = storage.path("weights/whole")
    shutil.copytree(models_file.parent / "tiny", folder)
    write_manifest(folder)
    tuned = TunedWeights(id="whole", kind=WeightsKind.FULL, path="weights/whole")
    client.ask("whole", tuned=tuned)
    assert isinstance(client.answer("whole")[-1], Finished)
    shutil.rmtree(folder)
    client.ask("removed", tuned=tuned)  # though it is still in memory
    [failed] = client.answer("removed")
    assert isinstance(failed, Failed)
    assert failed.code == "model_unavailable"
    client.ask("others go on")
    assert isinstance(client.answer("others go on")[-1], Finished)


def test_new_weights_are_in_memory_before_anybody_asks_for_them(
    client: Client, storage: Storage, models_file: Path
) -> None:
    base = load_base_model(models_file.parent / "tiny", quantize_4bit=False, device=torch.device("cpu"))
    with quiet_peft():
        get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(
            storage.path("weights/new")
        )
    write_manifest(storage.path("weights/new"))
    client.ask("first")
    client.answer("first")  # the engine runs
    tuned = TunedWeights(id="new", kind=WeightsKind.LORA, path="weights/new")
    announce(client.redis, NewWeights(base_model="tiny", tuned=tuned))
    client.ask("busy", sampling=Sampling(max_tokens=300, temperature=0))
    client.answer("busy")
    (storage.path("weights/new") / "adapter_model.safetensors").unlink()  # it can be read no more
    client.ask("new", tuned=tuned)
    assert isinstance(client.answer("new")[-1], Finished)


@pytest.mark.parametrize("path", ["weights/none", "/etc", "weights/../../x", "../weights/x", ""])
def test_tuned_weights_that_are_not_in_storage_fail_with_503(client: Client, path: str) -> None:
    client.ask(f"gone {path}", tuned=TunedWeights(id=path, kind=WeightsKind.LORA, path=path))
    [failed] = client.answer(f"gone {path}")
    assert isinstance(failed, Failed)
    assert (failed.status, failed.code) == (503, "model_unavailable")
    assert not path or path not in failed.message


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
    # Greedy answers of this model never end by themselves; 64 choices take it many seconds.
    client.ask("left", sampling=Sampling(max_tokens=450, temperature=0, n=64))
    wait_for(lambda: client.words("left"))
    client.redis.publish(CANCELS, "left")
    client.ask("next")  # behind the choices that still wait, unless those have gone too
    client.answer("next")
    words = client.words("left")
    assert not any(isinstance(word, Finished) for word in words)
    client.ask("after next")
    client.answer("after next")
    assert client.words("left") == words


def test_a_cancel_that_overtakes_its_request_is_heeded(client: Client) -> None:
    client.redis.publish(CANCELS, "early")
    client.ask("meanwhile")
    client.answer("meanwhile")  # a far longer way than the cancel's
    client.ask("early")
    for later in ("later", "much later"):
        client.ask(later)
        client.answer(later)
    assert client.words("early") == []


def test_a_worker_told_to_stop_ends_what_runs_with_a_word_and_leaves_soon(
    client: Client, start_worker: Callable[..., subprocess.Popen[bytes]]
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


def test_a_process_whose_engine_died_tells_everybody_and_ends_with_an_error(
    client: Client, start_worker: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    """Nothing mends a broken device within a process, so its supervisor has to start another."""
    client.redis.delete(STREAM)
    broken = tmp_path / "broken"
    worker = start_worker(BREAKABLE, BROKEN_IF=str(broken), LUTHIER_MODELS_FILE=str(other_names(tmp_path)))
    try:
        wait_for(lambda: {"base_models": ["other"]} in present(client), timeout_s=120)
        client.ask("fine", base_model="other")
        assert isinstance(client.answer("fine")[-1], Finished)
        broken.touch()
        for number in range(3):
            client.ask(f"hit{number}", base_model="other")
            assert [word.code for word in client.answer(f"hit{number}")] == ["engine_error"]  # type: ignore[union-attr]
        assert worker.wait(timeout=30) == 70
        assert {"base_models": ["other"]} not in present(client)
    finally:
        worker.kill()
        worker.wait()


def test_an_engine_that_hangs_is_announced_no_more_and_in_the_end_its_process_ends(
    client: Client, start_worker: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    hangs = tmp_path / "hangs"
    worker = start_worker(HANGABLE, HANGS_IF=str(hangs), LUTHIER_MODELS_FILE=str(other_names(tmp_path)))
    try:
        wait_for(lambda: {"base_models": ["other"]} in present(client), timeout_s=120)
        hangs.touch()
        client.ask("hung", base_model="other")
        wait_for(lambda: {"base_models": ["other"]} not in present(client), timeout_s=10)
        hangs.unlink()
        assert isinstance(client.answer("hung")[-1], Finished)
        wait_for(lambda: {"base_models": ["other"]} in present(client), timeout_s=10)
        hangs.touch()
        client.ask("hung again", base_model="other")
        assert worker.wait(timeout=30) == 70
    finally:
        worker.kill()
        worker.wait()


def present(client: Client) -> list[dict[str, Any]]:
    return presence.list_present(client.redis, kind="inference")


def other_names(folder: Path) -> Path:
    """A catalogue whose only model no other worker serves."""
    build_tiny_model(folder / "other")
    file = folder / "models.toml"
    file.write_text(
        f'[models.other]\nsource = "file://{folder}/other"\ncontext_length = 512\nlicence = "MIT"\n'
    )
    return file
