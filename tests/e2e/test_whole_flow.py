"""Real processes, real servers, the official client: a user's day from the first file to the last delete."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.crowd import crowd, make_keys
from tests.e2e.flow import run_flow, training_lines, wait_final
from tests.e2e.service import KEY, Service, running_service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("service")) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=service.base_url, api_key=KEY, _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


def child(service: Service, words: str) -> psutil.Process:
    """The one process below `up` with these words in its command line."""
    below = psutil.Process(service.process.pid).children(recursive=True)
    lines = {process: " ".join(process.cmdline()) for process in below}
    found = [process for process, line in lines.items() if words in line and "leash" not in line]
    assert len(found) == 1, lines
    return found[0]


def start_long_job(client: openai.OpenAI) -> str:
    """Ten thousand steps: minutes of work."""
    file = client.files.create(file=("long.jsonl", training_lines(200)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 50, "batch_size": 1}
    )
    wait_for_step(client, job.id)
    return job.id


def wait_for_step(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        events = client.fine_tuning.jobs.list_events(job_id, limit=20).data
        if any(event.type == "metrics" for event in events):
            return
        time.sleep(0.1)
    raise AssertionError("no step in 120 s")


def test_a_script_written_for_openai_runs_to_its_end(client: openai.OpenAI) -> None:
    seen = run_flow(client, "tiny")
    job, events = seen["job"], seen["events"]
    assert job.fine_tuned_model.startswith("ft:tiny:luthier:flow:")
    assert job.hyperparameters.model_dump() == job.method.supervised.hyperparameters.model_dump()
    assert job.trained_tokens > 0
    assert events[:4] == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file} and validation file: {job.validation_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
    ]
    assert events[4].startswith("Before training: full validation loss=")
    assert events[5].startswith("Step 1/12: training loss=")
    assert events[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert [checkpoint.step_number for checkpoint in seen["checkpoints"]] == [12, 9, 6]
    header, *rows = seen["results"].splitlines()
    assert header == "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy"
    assert [row.split(",")[0] for row in rows] == [str(step) for step in range(1, 13)]


def test_what_was_taught_is_answered_and_the_base_is_not_changed(client: openai.OpenAI) -> None:
    file = client.files.create(file=("hello.jsonl", training_lines(12)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=file.id,
        seed=3,
        hyperparameters={"n_epochs": 40, "batch_size": 4, "learning_rate_multiplier": 10},
    )
    job = wait_final(client, job.id)
    assert job.status == "succeeded", job.error

    def ask(model: str) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "say it 7"}],
            temperature=0,
            max_completion_tokens=8,
        )
        return answer.choices[0].message.content or ""

    before = ask("tiny")
    assert ask(str(job.fine_tuned_model)) == "hello"
    assert "hello" not in before
    assert ask("tiny") == before


def test_questions_asked_together_get_the_answers_they_get_alone(client: openai.OpenAI) -> None:
    questions = [f"say {'it ' * i}{i}" for i in range(8)]
    alone = [ask(client, question) for question in questions]
    together: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda i=i, q=q: together.update({i: ask(client, q)}))
        for i, q in enumerate(questions)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[i] for i in range(8)] == alone


def ask(client: openai.OpenAI, question: str) -> str:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": question}], temperature=0, max_tokens=16
    )
    return answer.choices[0].message.content or ""


def is_working(process: psutil.Process) -> bool:
    """Whether it takes more than a fifth of a core for a second."""
    try:
        before = sum(process.cpu_times()[:2])
        time.sleep(1)
        return sum(process.cpu_times()[:2]) - before > 0.2
    except psutil.NoSuchProcess:
        return False


def test_two_hundred_open_streams_all_end_whole_and_no_project_is_passed_over(service: Service) -> None:
    keys = make_keys(service, 2)
    all_heard = asyncio.run(crowd(service.base_url, keys, streams=200, tokens=8, model="tiny"))
    assert [heard.error for heard in all_heard if heard.error] == []
    assert {heard.tokens for heard in all_heard} == {8}
    first_half = sorted(all_heard, key=lambda heard: heard.ended)[:100]
    assert 25 <= sum(heard.project for heard in first_half) <= 75


def test_a_cancel_frees_the_trainer_at_once(client: openai.OpenAI, service: Service) -> None:
    job_id = start_long_job(client)
    trainer = child(service, "worker.training")
    assert is_working(trainer)
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    deadline = time.monotonic() + 15
    while is_working(trainer):
        assert time.monotonic() < deadline, "the trainer works on for a job that was cancelled"
    events = client.fine_tuning.jobs.list_events(job_id, limit=1).data
    file = client.files.create(file=("next.jsonl", training_lines()), purpose="fine-tune")
    following = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 4}
    )
    assert wait_final(client, following.id).status == "succeeded"
    assert client.fine_tuning.jobs.list_events(job_id, limit=1).data == events
    assert client.fine_tuning.jobs.retrieve(job_id).status == "cancelled"


def test_a_killed_trainer_costs_the_job_nothing_but_time(client: openai.OpenAI, service: Service) -> None:
    file = client.files.create(file=("kill.jsonl", training_lines(30)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 6, "batch_size": 1}
    )
    wait_for_step(client, job.id)
    child(service, "worker.training").send_signal(signal.SIGKILL)
    job = wait_final(client, job.id)
    assert job.status == "succeeded", job.error
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=100)]
    assert any("SIGKILL" in message for message in messages)
    steps = [message for message in messages if message.startswith("Step ")]
    assert len(steps) == len(set(steps)) == 180


def test_a_killed_worker_is_started_again_and_answers(client: openai.OpenAI, service: Service) -> None:
    said_before = len(service.printed)
    worker = child(service, "--queues inference")
    worker.send_signal(signal.SIGKILL)
    psutil.wait_procs([worker], timeout=10)  # one that dies may take a request along: 503 after a minute
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "say it"}], max_tokens=4
            )
            break
        except openai.InternalServerError as error:
            assert error.status_code == 503
            assert error.response.headers["retry-after"]
            time.sleep(0.5)
    else:
        raise AssertionError("no answer 120 s after the worker was killed")
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert child(service, "--queues inference").pid != worker.pid
    said = "".join(service.printed[said_before:])
    assert "ended part=inference cause=signal 9" in said
    assert "started part=inference" in said


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_lines_that_up_prints_work_as_they_are(service: Service) -> None:
    lines = [line.strip() for line in service.printed if line.strip().startswith("curl ")]
    replies = []
    for line in lines:
        argv = ["sh", "-c", line.replace("curl ", "curl -sS -f ", 1)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        replies.append(json.loads(done.stdout)["object"])
    assert replies == ["list", "chat.completion", "file"]


def test_the_api_process_is_small_and_has_no_torch(service: Service) -> None:
    api = child(service, "app.cli.main api")
    assert not [m for m in api.memory_maps() if "torch" in m.path]
    assert api.memory_info().rss < 200 * 2**20


def test_readiness_names_every_part(service: Service) -> None:
    answer = httpx.get(service.base_url.removesuffix("/v1") + "/readyz")
    assert answer.json()["parts"] == dict.fromkeys(
        ["database", "broker", "storage", "control", "training", "inference"], "ok"
    )


def test_everything_is_found_again_after_a_restart_and_nothing_is_left_running(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        client = openai.OpenAI(base_url=service.base_url, api_key=KEY)
        seen = run_flow_without_deleting(client)
        running = psutil.Process(service.process.pid).children(recursive=True)
        began = time.monotonic()
        service.process.send_signal(signal.SIGINT)
        service.process.wait(timeout=30)
        assert time.monotonic() - began < 15
        assert not [process for process in running if process.is_running()]
    with running_service(tmp_path) as service:
        client = openai.OpenAI(base_url=service.base_url, api_key=KEY)
        job = client.fine_tuning.jobs.retrieve(seen["job"])
        assert job.status == "succeeded"
        assert client.files.content(seen["file"]).read() == training_lines()
        assert_answers(client, str(job.fine_tuned_model))
        running = psutil.Process(service.process.pid).children(recursive=True)
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait()
        _, alive = psutil.wait_procs(running, timeout=15)
        assert not alive
    with running_service(tmp_path) as service:
        client = openai.OpenAI(base_url=service.base_url, api_key=KEY)
        assert client.files.content(seen["file"]).read() == training_lines()
        assert str(job.fine_tuned_model) in [model.id for model in client.models.list()]
        assert_answers(client, str(job.fine_tuned_model))


def assert_answers(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "hi"}], temperature=0, max_tokens=4
    )
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 4


def run_flow_without_deleting(client: openai.OpenAI) -> dict[str, str]:
    file = client.files.create(file=("keep.jsonl", training_lines()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model="tiny", training_file=file.id, hyperparameters={"n_epochs": 1, "batch_size": 4}
    )
    assert wait_final(client, job.id).status == "succeeded"
    return {"file": file.id, "job": job.id}
