"""The completions before chat: asked by the official client, answered by a stand-in worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import (
    Chance,
    CompletionRequest,
    Delta,
    Failed,
    Finished,
    FinishReason,
    TokenChance,
    Word,
)
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.test_chat import wait_for
from tests.api.workers import InferenceWorker, says

PATH = "/v1/completions"
BODY: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "prompt": "Once"}


@pytest.fixture
def client(tenant: Tenant, server_url: str) -> Iterator[openai.OpenAI]:
    """The client as a user makes it, but strict."""
    with openai.OpenAI(
        api_key=tenant.secret, base_url=f"{server_url}/v1", _strict_response_validation=True
    ) as client:
        yield client


@pytest.fixture
def lax(tenant: Tenant, server_url: str) -> Iterator[openai.OpenAI]:
    """For streams: the client's types forbid the null that OpenAI sends as `finish_reason` until the end."""
    with openai.OpenAI(api_key=tenant.secret, base_url=f"{server_url}/v1") as client:
        yield client


def repeat(request: CompletionRequest) -> list[list[Word]]:
    """Every choice says its prompt and its number."""
    texts = [[Delta(index=i, text=f"{request.prompt}:{i}")] for i in range(request.sampling.n)]
    end = {"reason": FinishReason.STOP, "prompt_tokens": 3, "completion_tokens": 2}
    return [*texts, [Finished(index=i, **end) for i in range(request.sampling.n)]]  # type: ignore[arg-type]


def test_a_text_goes_on(client: openai.OpenAI, worker: InferenceWorker) -> None:
    worker.script = says(" upon", " a time", reason=FinishReason.LENGTH)
    answer = client.completions.create(**BODY, temperature=0, seed=1, stop="END")
    assert answer.id.startswith("cmpl-")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" upon a time", "length")
    [request] = worker.requests
    assert (request.prompt, request.messages) == ("Once", [])
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (16, 0.0, ("END",))


def test_choices_of_several_prompts_come_in_the_order_of_the_prompts(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = repeat
    body = BODY | {"prompt": ["a", "b", "c"]}
    answer = client.completions.create(**body, n=2)
    assert [c.text for c in answer.choices] == ["a:0", "a:1", "b:0", "b:1", "c:0", "c:1"]
    assert [c.index for c in answer.choices] == list(range(6))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 12)


def test_a_stream_of_several_prompts_tells_them_apart(lax: openai.OpenAI, worker: InferenceWorker) -> None:
    worker.script = repeat
    texts = ["", ""]
    ends: list[int] = []
    body = BODY | {"prompt": ["a", "b"]}
    chunks = list(lax.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        ends += [choice.index] if choice.finish_reason else []
    assert (texts, sorted(ends)) == (["a:0", "b:0"], [0, 1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 10


def test_token_ids_reach_the_worker_as_one_prompt_or_several(
    client: openai.OpenAI, worker: InferenceWorker
) -> None:
    client.completions.create(model=DEFAULT_BASE_MODEL, prompt=[1, 2, 3])
    assert [request.prompt for request in worker.requests] == [(1, 2, 3)]
    client.completions.create(model=DEFAULT_BASE_MODEL, prompt=[[1], [2, 3]])
    assert [request.prompt for request in worker.requests[1:]] == [(1,), (2, 3)]


def test_an_echo_puts_the_prompt_before_each_choice(
    client: openai.OpenAI, lax: openai.OpenAI, worker: InferenceWorker
) -> None:
    worker.script = says("!")
    body = BODY | {"prompt": ["a", "b"]}
    assert [c.text for c in client.completions.create(**body, echo=True).choices] == ["a!", "b!"]
    streamed = ["", ""]
    for chunk in lax.completions.create(**body, echo=True, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == ["a!", "b!"]


def test_log_probabilities_have_the_old_shape(
    client: openai.OpenAI, lax: openai.OpenAI, worker: InferenceWorker
) -> None:
    def chance(text: str) -> TokenChance:
        one = Chance(token=text, bytes=tuple(text.encode()), logprob=-0.5)
        return TokenChance(**one.model_dump(), top_logprobs=(one,))

    end = Finished(index=0, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=3)
    worker.script = lambda _: [
        [Delta(index=0, text="hü", logprobs=(chance("h"), chance("ü")))],
        [Delta(index=0, text="!", logprobs=(chance("!"),)), end],
    ]
    logprobs = client.completions.create(**BODY, logprobs=1).choices[0].logprobs
    assert logprobs is not None
    assert worker.requests[0].sampling.top_logprobs == 1
    assert logprobs.tokens == ["h", "ü", "!"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs == [{"h": -0.5}, {"ü": -0.5}, {"!": -0.5}]
    assert logprobs.text_offset == [0, 1, 2]
    chunks = [c.choices[0].logprobs for c in lax.completions.create(**BODY, logprobs=1, stream=True)]
    assert [offset for one in chunks if one for offset in one.text_offset or ()] == [0, 1, 2]


def test_the_likeliest_of_more_choices_are_the_answer(client: openai.OpenAI, worker: InferenceWorker) -> None:
    def script(request: CompletionRequest) -> list[list[Word]]:
        words: list[Word] = []
        for index, logprob in enumerate((-2.0, -0.5, -1.0)):
            chance = Chance(token="x", bytes=(120,), logprob=logprob)
            said = (TokenChance(**chance.model_dump(), top_logprobs=()),) * (index + 1)
            words.append(Delta(index=index, text=f"{request.prompt}{index}", logprobs=said))
            end = Finished(
                index=index, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=index + 1
            )
            words.append(end)
        return [words]

    worker.script = script
    answer = client.completions.create(**BODY | {"prompt": ["a", "b"]}, n=2, best_of=3)
    assert [(choice.index, choice.text) for choice in answer.choices] == list(
        enumerate(["a1", "a2", "b1", "b2"])
    )
    assert [choice.logprobs for choice in answer.choices] == [None] * 4
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * (1 + 2 + 3)
    assert {(r.sampling.n, r.sampling.top_logprobs) for r in worker.requests} == {(3, 0)}
    [best] = client.completions.create(**BODY | {"prompt": "a"}, best_of=3, logprobs=1).choices
    assert best.logprobs is not None
    assert (best.text, best.logprobs.token_logprobs) == ("a1", [-0.5, -0.5])
    assert worker.requests[-1].sampling.top_logprobs == 1


def test_one_prompt_that_fails_ends_all_of_them(tenant: Tenant, worker: InferenceWorker) -> None:
    failed = Failed(status=400, code="context_length_exceeded", message="This is too long.", param="prompt")

    def script(request: CompletionRequest) -> list[list[Word]]:
        return [[failed]] if request.prompt == "long" else [[Delta(index=0, text="so far")]]

    worker.script = script
    answer = tenant.http.post(PATH, json=BODY | {"prompt": ["a", "long"]})
    assert_refused(answer, 400, code="context_length_exceeded", param="prompt")
    wait_for(lambda: worker.requests[0].id in worker.cancels)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a suffix": ({"suffix": "end"}, "unsupported_parameter", "suffix"),
    "a stream of the best": ({"best_of": 3, "stream": True}, "unsupported_parameter", "best_of"),
    "the best of fewer": ({"best_of": 2, "n": 3}, "invalid_value", "best_of"),
    "the best of many": ({"best_of": 5}, "integer_above_max_value", "best_of"),
    "an echo with logprobs": ({"echo": True, "logprobs": 1}, "unsupported_parameter", "echo"),
    "an echo of ids": ({"echo": True, "prompt": [1]}, "unsupported_parameter", "echo"),
    "six logprobs": ({"logprobs": 6}, "integer_above_max_value", "logprobs"),
    "no prompts": ({"prompt": []}, "empty_array", "prompt"),
    "a number": ({"prompt": 1}, "invalid_type", "prompt"),
    "a negative id": ({"prompt": [-1]}, "invalid_type", "prompt"),
    "a mixture": ({"prompt": [1, "a"]}, "invalid_type", "prompt"),
    "65 prompts": ({"prompt": ["a"] * 65}, "array_above_max_length", "prompt"),
    "too many tokens": ({"max_tokens": 10**6}, "integer_above_max_value", "max_tokens"),
    "too much work": ({"prompt": ["a"] * 64, "n": 4, "max_tokens": 4096}, "invalid_value", "n"),
    "messages": ({"messages": []}, "unknown_parameter", "messages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused_by_name(tenant: Tenant, worker: InferenceWorker, case: str) -> None:
    fields, code, param = REFUSED[case]
    assert_refused(tenant.http.post(PATH, json=BODY | fields), 400, code=code, param=param)
    assert worker.requests == []
