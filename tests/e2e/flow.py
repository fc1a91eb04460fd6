"""Upload → job → events → checkpoints → chat → delete, as a client of any release from 1.x on would do it.

A program too: `OPENAI_BASE_URL=… OPENAI_API_KEY=… python tests/e2e/flow.py MODEL` runs it with whatever
`openai` is installed, and prints what it saw.
"""

from __future__ import annotations

import io
import json
import sys
import time
from typing import Any

import openai

WAIT_S = 240


def training_lines(n: int = 12) -> bytes:
    """A file that teaches one answer."""
    rows = [
        {"messages": [{"role": "user", "content": f"say it {i}"}, {"role": "assistant", "content": "hello"}]}
        for i in range(n)
    ]
    return "\n".join(json.dumps(row) for row in rows).encode()


def wait_final(client: openai.OpenAI, job_id: str, *, wait_s: float = WAIT_S) -> Any:
    """Poll a job to its end."""
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.1)
    raise AssertionError(f"{job_id} is still {job.status} after {wait_s} s")


def run_flow(client: openai.OpenAI, model: str) -> dict[str, Any]:
    """Everything a fine-tuning script does; returns what a test may look at."""
    file = client.files.create(file=io.BytesIO(training_lines()), purpose="fine-tune")
    client.files.wait_for_processing(file.id)
    assert client.files.content(file.id).read() == training_lines()
    job = client.fine_tuning.jobs.create(
        model=model,
        training_file=file.id,
        validation_file=file.id,
        suffix="flow",
        seed=1,
        hyperparameters={"n_epochs": 4, "batch_size": 4},
    )
    assert job.status == "validating_files"
    job = wait_final(client, job.id)
    assert job.status == "succeeded", job.error
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    results = client.files.content(job.result_files[0]).text
    answers = {}
    for name in (model, job.fine_tuned_model, checkpoints[0].fine_tuned_model_checkpoint):
        question: Any = {
            "model": name,
            "messages": [{"role": "user", "content": "say it 3"}],
            "temperature": 0,
            "max_tokens": 8,
        }
        whole = client.chat.completions.create(**question)
        parts = list(client.chat.completions.create(**question, stream=True))
        streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert streamed == whole.choices[0].message.content
        answers[name] = streamed
    assert job.fine_tuned_model in [listed.id for listed in client.models.list()]
    assert client.models.delete(job.fine_tuned_model).deleted
    assert client.files.delete(file.id).deleted
    try:
        client.models.retrieve(job.fine_tuned_model)
    except openai.NotFoundError as error:
        assert error.code == "model_not_found"
    else:
        raise AssertionError("a deleted model is still there")
    return {
        "job": job,
        "events": [event.message for event in reversed(events)],
        "checkpoints": checkpoints,
        "results": results,
        "answers": answers,
    }


def main() -> None:
    """Run the flow against the service named by the environment."""
    seen = run_flow(openai.OpenAI(), sys.argv[1])
    steps = len(seen["results"].splitlines()) - 1
    sys.stdout.write(
        f"openai {openai.__version__}: {seen['job'].id} succeeded, {len(seen['events'])} events, "
        f"{len(seen['checkpoints'])} checkpoints, {steps} steps, answers {list(seen['answers'].values())}\n"
    )


if __name__ == "__main__":
    main()
