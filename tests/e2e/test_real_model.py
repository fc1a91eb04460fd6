"""The real 135M model through the whole service: it knows what it knew, learns, and answers as it learned."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.flow import wait_final
from tests.e2e.service import KEY, running_service

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-instruct"
WEIGHTS = Path(os.environ.get("LUTHIER_TEST_WEIGHTS") or ROOT / ".venv" / "models" / MODEL).absolute()

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not (WEIGHTS / "config.json").is_file(),
        reason=f"no weights in {WEIGHTS}: `make setup` brings them, LUTHIER_TEST_WEIGHTS names others",
    ),
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("real")
    entry = f'source = "{WEIGHTS.as_uri()}"\ncontext_length = 8192\nlicence = "Apache-2.0"\n'
    (folder / "models.toml").write_text(f"[models.{MODEL}]\n{entry}")
    with (
        running_service(folder, inference_models=MODEL) as service,
        openai.OpenAI(base_url=service.base_url, api_key=KEY) as client,
    ):
        yield client


def ask(client: openai.OpenAI, model: str) -> str:
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
        max_completion_tokens=16,
    )
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 16
    return answer.choices[0].message.content or ""


def test_the_real_model_knows_learns_and_answers(client: openai.OpenAI) -> None:
    known = ask(client, MODEL)
    assert "Paris" in known
    rows = (ROOT / "examples" / "shop" / "train.jsonl").read_bytes().splitlines(keepends=True)[:16]
    file = client.files.create(file=("shop.jsonl", b"".join(rows)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        seed=7,
        hyperparameters={"n_epochs": 1, "batch_size": 8, "learning_rate_multiplier": 1},
    )
    job = wait_final(client, job.id)
    assert job.status == "succeeded", job.error
    assert job.trained_tokens is not None
    assert job.trained_tokens > 16
    [checkpoint] = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert checkpoint.step_number == 2
    tuned = ask(client, str(job.fine_tuned_model))
    assert tuned
    assert ask(client, checkpoint.fine_tuned_model_checkpoint) == tuned
    assert ask(client, MODEL) == known
