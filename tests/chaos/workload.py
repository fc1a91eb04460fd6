"""A tenant of the private service: what a user does, by the official client, and a ledger of it.

Every request that creates carries an Idempotency-Key and is sent again until it is accepted, as a careful
client does. What the service answered in between is counted.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import openai

T = TypeVar("T")
PATIENCE_S = 90.0
FINAL = ("succeeded", "failed", "cancelled")
QUIET = (*FINAL, "paused")


def training_lines(count: int, *, word: str = "yes") -> bytes:
    """A file of examples of unequal length."""
    rows = []
    for number in range(count):
        question = f"Where is my order {number}?" + " Thank you." * (number % 4)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {word}."}]
        rows.append(json.dumps({"messages": messages}))
    return ("\n".join(rows) + "\n").encode()


class Tenant:
    """One project's user."""

    def __init__(self, base_url: str, key: str, name: str) -> None:
        self.name = name
        self.key = key
        self.client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0, timeout=20)
        self.jobs: list[str] = []
        self.files: dict[str, str] = {}  # id -> sha256 of what was sent
        self.answers: Counter[str] = Counter()  # what requests were answered with, beside 200
        self.slowest_s = 0.0
        self._by_size: dict[int, str] = {}

    def insist(self, action: Callable[[], T], *, patience_s: float = PATIENCE_S) -> T:
        """Repeat a request until it is answered; refusals that are the client's fault are raised."""
        deadline = time.monotonic() + patience_s
        while True:
            begun = time.monotonic()
            try:
                return action()
            except openai.APIConnectionError as error:
                self.answers[type(error).__name__] += 1
                last: Exception = error
            except openai.APIStatusError as error:
                self.answers[str(error.status_code)] += 1
                if error.status_code < 500 and error.status_code not in (409, 429):
                    raise
                if error.status_code == 503 and "retry-after" not in error.response.headers:
                    self.answers["503 without retry-after"] += 1
                last = error
            finally:
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer in {patience_s:g} s") from last
            time.sleep(0.25)

    def upload(self, count: int = 12) -> str:
        """A training file of that many examples; one upload each size."""
        if count not in self._by_size:
            self._by_size[count] = self.upload_bytes(training_lines(count))
        return self._by_size[count]

    def upload_bytes(self, data: bytes) -> str:
        """A file; noted with its digest."""
        key = {"Idempotency-Key": uuid.uuid4().hex}

        def send() -> str:
            return self.client.files.create(
                file=("train.jsonl", io.BytesIO(data)), purpose="fine-tune", extra_headers=key
            ).id

        file_id = self.insist(send)
        self.files[file_id] = hashlib.sha256(data).hexdigest()
        return file_id

    def create(
        self,
        *,
        steps: int = 6,
        seed: int = 7,
        file: str | None = None,
        key: str | None = None,
        **luthier: Any,
    ) -> str:
        """A job of about so many steps (12 examples, batches of 4: 3 an epoch)."""
        file = file or self.upload()
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        body: dict[str, Any] = {"luthier": luthier} if luthier else {}

        def send() -> str:
            return self.client.fine_tuning.jobs.create(
                model="tiny",
                training_file=file,
                seed=seed,
                hyperparameters={"n_epochs": max(1, steps // 3), "batch_size": 4},
                extra_headers=headers,
                extra_body=body,
            ).id

        job_id = self.insist(send)
        if job_id not in self.jobs:
            self.jobs.append(job_id)
        return job_id

    def get(self, job_id: str) -> Any:
        """The job as the API tells it."""
        return self.insist(lambda: self.client.fine_tuning.jobs.retrieve(job_id))

    def act(self, job_id: str, what: str) -> Any:
        """`cancel`, `pause` or `resume`."""
        return self.insist(
            lambda: self.client.post(f"/fine_tuning/jobs/{job_id}/{what}", cast_to=object, body={})
        )

    def wait(self, job_id: str, *statuses: str, timeout_s: float = PATIENCE_S) -> Any:
        """The job once it is in one of these states, or in any final one."""
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.get(job_id)
            if job.status in (statuses or QUIET) or job.status in FINAL:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job_id} is still {job.status} after {timeout_s:g} s")
            time.sleep(0.05)

    def chat(self, model: str, *, timeout_s: float = 20.0, max_tokens: int = 4) -> str:
        """One short answer."""
        answer = self.client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "Where is my order 3?"}],
            max_tokens=max_tokens,
            temperature=0,
            timeout=timeout_s,
        )
        return answer.choices[0].message.content or ""

    def close(self) -> None:
        """Let go of connections."""
        self.client.close()
