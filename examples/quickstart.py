"""Fine-tune the built-in model on the shop example and talk to the result.

Needs `pip install openai` and two variables: OPENAI_BASE_URL, such as http://127.0.0.1:8000/v1,
and OPENAI_API_KEY.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from openai import OpenAI
from openai.types.fine_tuning import FineTuningJob

TRAIN = Path(__file__).parent / "shop" / "train.jsonl"
BASE_MODEL = "smollm2-135m-instruct"
WAIT_S = 4 * 3600  # give up watching after that; the job itself goes on
POLL_S = 3
QUESTIONS = [
    "hello?? I paid for a kickstand two weeks ago, where is it",
    "The brakes make no sound any more and also no braking. Help, I ride to school tomorrow!",
    "you made my week, the old tandem sings again",
]


def wait(client: OpenAI, job_id: str) -> FineTuningJob:
    """Print the job's events as they come, until it has ended."""
    seen: set[str] = set()
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        job = client.fine_tuning.jobs.retrieve(job_id)  # before the events, so the last ones are not missed
        newest_first = client.fine_tuning.jobs.list_events(job_id, limit=100).data
        for event in reversed(newest_first):
            if event.id not in seen:
                seen.add(event.id)
                print(f"  {event.message}")
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(POLL_S)
    sys.exit(f"{job_id} is still at work after {WAIT_S // 3600} hours; look again later.")


def main() -> None:
    client = OpenAI()  # reads OPENAI_BASE_URL and OPENAI_API_KEY
    file = client.files.create(file=TRAIN, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(training_file=file.id, model=BASE_MODEL, suffix="shop")
    print(f"{job.id} on {file.id}")
    job = wait(client, job.id)
    if job.status != "succeeded" or job.fine_tuned_model is None:
        sys.exit(f"{job.id} {job.status}: {job.error.message if job.error else 'no reason given'}")

    print(f"{job.fine_tuned_model}\n")
    with TRAIN.open(encoding="utf-8") as lines:
        system = json.loads(next(lines))["messages"][0]["content"]  # ask as the model was taught
    for question in QUESTIONS:
        answer = client.chat.completions.create(
            model=job.fine_tuned_model,
            messages=[{"role": "system", "content": system}, {"role": "user", "content": question}],
            temperature=0,
            max_tokens=100,
        )
        print(f"> {question}\n{answer.choices[0].message.content}\n")


if __name__ == "__main__":
    main()
