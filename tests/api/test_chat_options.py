"""Options of a chat request that change what an answer carries."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import (
    Chance,
    CompletionRequest,
    Delta,
    Finished,
    FinishReason,
    TokenChance,
    Word,
)
from app.core.queue import inference_queue
from app.core.settings import Settings
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.servers import api_server
from tests.api.test_chat import BODY, PATH, chat, events, wait_for
from tests.api.workers import InferenceWorker

END = Finished(index=0, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=1)


def test_log_probabilities_come_with_the_text_they_belong_to(tenant: Tenant, worker: InferenceWorker) -> None:
    chance = Chance(token="ü", bytes=(195, 188), logprob=-0.5)
    said = [TokenChance(**chance.model_dump(), top_logprobs=(chance,)) for _ in range(2)]
    worker.script = lambda _: [
        [Delta(index=0, text="ü", logprobs=(said[0],))],
        [Delta(index=0, text="ü", logprobs=(said[1],)), END],
    ]
    shape = {"token": "ü", "bytes": [195, 188], "logprob": -0.5}
    expected = shape | {"top_logprobs": [shape]}
    whole = chat(tenant, logprobs=True, top_logprobs=1).json()["choices"][0]
    assert whole["logprobs"] == {"content": [expected, expected], "refusal": None}
    choices = [chunk["choices"][0] for chunk in events(chat(tenant, logprobs=True, stream=True))]
    assert [choice["logprobs"] for choice in choices] == [
        None,
        {"content": [expected], "refusal": None},
        {"content": [expected], "refusal": None},
        None,
    ]


def test_a_line_that_is_full_refuses_the_next_one_and_queues_nothing(
    tenant: Tenant, settings: Settings, worker: InferenceWorker
) -> None:
    release = threading.Event()

    def wait(request: CompletionRequest) -> list[list[Word]]:
        assert release.wait(20)
        return [[END]]

    worker.script = wait
    headers = dict(tenant.http.headers)
    queue = inference_queue(DEFAULT_BASE_MODEL)
    with (
        api_server(settings.model_copy(update={"max_waiting_requests": 2, "first_word_s": 20.0})) as url,
        httpx.Client(base_url=url, headers=headers, timeout=30) as client,
        ThreadPoolExecutor() as threads,
    ):
        running = [threads.submit(client.post, PATH, json=BODY)]
        wait_for(lambda: len(worker.requests) == 1)  # the stand-in takes one at a time
        for waiting in (1, 2):
            running.append(threads.submit(client.post, PATH, json=BODY))
            wait_for(lambda waiting=waiting: worker.client.llen(queue) == waiting)  # type: ignore[misc]
        refused = client.post(PATH, json=BODY | {"stream": True})
        assert_refused(refused, 503, code="overloaded", says=DEFAULT_BASE_MODEL)
        assert refused.headers["retry-after"] == "2"
        assert worker.client.llen(queue) == 2
        release.set()
        assert [one.result().status_code for one in running] == [200, 200, 200]
        assert client.post(PATH, json=BODY).status_code == 200
