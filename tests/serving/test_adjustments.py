"""Bias, penalties and log-probabilities, as numbers on a row of logits and as answers of an engine."""

from __future__ import annotations

from pathlib import Path

import torch

from app.core.completions import Chance, Delta, FinishReason, TokenChance
from tests.serving.conftest import CPU
from tests.serving.listener import Listener
from worker.base_model import load_base_model, load_tokenizer
from worker.serving.adjustments import Adjustments
from worker.serving.chances import ChanceStream
from worker.serving.sampling import LOGPROB_MIN, Chances, choose_tokens, make_chooser


def adjusted(logits: list[float], *made: int, **fields: object) -> list[float]:
    """The logits after tokens `made` were chosen under these adjustments."""
    adjustments = Adjustments(**fields)  # type: ignore[arg-type]
    for token_id in made:
        adjustments.take(token_id)
    logits_V = torch.tensor(logits)
    adjustments.apply(logits_V)
    return logits_V.tolist()


def test_penalties_count_the_generated_tokens_by_openais_formula():
    logits = [1.0, 2.0, 3.0]
    assert adjusted(logits, frequency_penalty=1.0, presence_penalty=1.0) == logits
    assert adjusted(logits, 0, 0, 0, 2, frequency_penalty=0.5) == [-0.5, 2.0, 2.5]
    assert adjusted(logits, 0, 0, 0, 2, presence_penalty=0.5) == [0.5, 2.0, 2.5]
    assert adjusted(logits, 0, 0, 0, 2, frequency_penalty=0.5, presence_penalty=-2.0) == [1.5, 2.0, 4.5]


def test_a_bias_is_added_to_its_tokens_only():
    assert adjusted([1.0, 2.0, 3.0], bias={2: -100.0, 0: 1.5}) == [2.5, 2.0, -97.0]


def test_one_rows_adjustments_leave_its_neighbours_and_the_models_logits_alone():
    logits_BV = torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1)
    choosers = [make_chooser(0.0, 1.0, seed=None, index=index) for index in range(3)]
    choosers[1].adjustments = Adjustments(bias={0: 50.0}, presence_penalty=2.0)
    assert choose_tokens(logits_BV, choosers) == [2, 0, 2]
    assert torch.equal(logits_BV, torch.tensor([[0.0, 1.0, 2.0]]).repeat(3, 1))


def test_log_probabilities_are_the_models_own_whatever_is_adjusted():
    logits_1V = torch.tensor([[0.0, 1.0, 2.0, -2e4]])
    chooser = make_chooser(0.0, 0.5, seed=None, index=0, adjustments=Adjustments(bias={3: 3e4}))
    chooser.top_logprobs = 2
    assert choose_tokens(logits_1V, [chooser]) == [3]
    expected = logits_1V[0].log_softmax(-1).tolist()
    assert chooser.chances is not None
    assert chooser.chances.logprob == LOGPROB_MIN
    assert [id for id, _ in chooser.chances.top] == [2, 1]
    torch.testing.assert_close([p for _, p in chooser.chances.top], expected[2:0:-1])


class Letters:
    """A vocabulary of four tokens: a, the two halves of ü, and a control token."""

    words = (b"a", b"\xc3", b"\xbc", b"<end>")

    def decode_bytes(self, tokens: list[int]) -> bytes:
        return b"".join(self.words[token] for token in tokens)

    def is_special_token(self, token: int) -> bool:
        return token == 3


def push_all(stream: ChanceStream, *tokens: int) -> None:
    for token in tokens:
        stream.push(token, Chances(-1.0, ((0, -2.0),)))


def test_a_part_of_a_character_shows_its_bytes_and_leaves_with_the_character():
    stream = ChanceStream(Letters())
    push_all(stream, 1)
    assert stream.take("") == ()
    push_all(stream, 2, 0)
    top = (Chance(token="a", bytes=(97,), logprob=-2.0),)
    assert stream.take("ü") == (
        TokenChance(token="\\xc3", bytes=(0xC3,), logprob=-1.0, top_logprobs=top),
        TokenChance(token="\\xbc", bytes=(0xBC,), logprob=-1.0, top_logprobs=top),
    )
    assert [chance.token for chance in stream.rest()] == ["a"]


def test_a_control_token_takes_no_room_in_the_text():
    stream = ChanceStream(Letters())
    push_all(stream, 0, 3, 0, 0)
    assert [chance.token for chance in stream.take("aa")] == ["a", "<end>", "a"]


def test_an_engine_reports_the_log_probabilities_of_a_plain_forward_pass(
    make_engine, make_request, ask, tiny_dir: Path
):
    listener = ask(make_engine(), make_request(max_tokens=12, top_logprobs=3)).wait()
    chances = [c for word in listener.words if isinstance(word, Delta) for c in word.logprobs or ()]
    assert len(chances) == listener.finished[0].completion_tokens == 12
    assert b"".join(bytes(c.bytes) for c in chances).decode("utf-8", "replace") == listener.text()

    tokenizer = load_tokenizer(tiny_dir)
    model = load_base_model(tiny_dir, quantize_4bit=False, device=CPU, dtype=torch.float32)
    messages = [{"role": "user", "content": "Where is my order?"}]
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])
    for chance in chances:
        logprobs_V = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        top = logprobs_V.topk(3)
        assert chance.logprob == chance.top_logprobs[0].logprob  # greedy
        torch.testing.assert_close([c.logprob for c in chance.top_logprobs], top.values.tolist())
        ids.append(int(top.indices[0]))


def test_a_stop_string_takes_its_log_probabilities_with_it(make_engine, make_request, ask):
    engine = make_engine()
    whole = ask(engine, make_request(max_tokens=40)).wait().text()
    stop = whole[12:15]
    cut = whole.index(stop)
    listener = ask(engine, make_request(max_tokens=40, stop=(stop,), top_logprobs=0)).wait()
    chances = [c for word in listener.words if isinstance(word, Delta) for c in word.logprobs or ()]
    text = b"".join(bytes(c.bytes) for c in chances).decode("utf-8", "replace")
    assert listener.text() == whole[:cut]
    assert text.startswith(whole[:cut])
    assert len(text) < cut + len(stop)  # at most the token in which the stop string begins
    assert all(c.top_logprobs == () for c in chances)


def test_a_banned_token_never_comes_and_a_penalty_thins_out_repetitions(
    make_engine, make_request, ask, tiny_dir: Path
):
    engine = make_engine()
    vocabulary = load_tokenizer(tiny_dir)

    def tokens(**sampling: object) -> list[str]:
        fields = {"max_tokens": 60, "top_logprobs": 0, "ignore_eos": True}
        listener: Listener = ask(engine, make_request(**(fields | sampling))).wait()
        return [c.token for w in listener.words if isinstance(w, Delta) for c in w.logprobs or ()]

    plain = tokens()
    favourite = max(plain, key=plain.count)
    assert plain.count(favourite) > 3
    [banned] = vocabulary.encode(favourite, add_special_tokens=False)
    assert favourite not in tokens(logit_bias={banned: -100.0})
    assert most_common(tokens(frequency_penalty=2.0)) < most_common(plain)


def most_common(tokens: list[str]) -> int:
    return max(tokens.count(token) for token in tokens)


def test_a_bias_on_a_token_the_model_does_not_have_is_refused_by_name(make_engine, make_request, ask):
    failed = ask(make_engine(), make_request(logit_bias={10**6: 1.0})).wait().failed
    assert (failed.status, failed.param) == (400, "logit_bias")


def test_with_ignore_eos_an_answer_has_all_its_tokens(make_engine, make_request, ask, tiny_dir: Path):
    engine = make_engine()
    end = load_tokenizer(tiny_dir).eos_token_id
    always = {"logit_bias": {end: 100.0}, "max_tokens": 5}
    stopped = ask(engine, make_request(**always)).wait().finished[0]
    assert (stopped.reason, stopped.completion_tokens) == (FinishReason.STOP, 0)
    ended = ask(engine, make_request(**always, ignore_eos=True)).wait().finished[0]
    assert (ended.reason, ended.completion_tokens) == (FinishReason.LENGTH, 5)
