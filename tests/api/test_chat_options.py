"""Options of a chat request that change what an answer carries."""

from __future__ import annotations

from app.core.completions import Chance, Delta, Finished, FinishReason, TokenChance
from tests.api.conftest import Tenant
from tests.api.test_chat import chat, events
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
