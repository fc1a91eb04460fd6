"""What a sender of requests sees: words in order, exact counts, one last word whatever happens."""

from __future__ import annotations

import threading
import time

import pytest

from app.core.completions import FinishReason
from tests.serving.listener import Listener, until
from tests.tiny import KV_TOKEN_BYTES
from worker.base_model import load_tokenizer
from worker.chat_template import ChatTemplate

CONTEXT = 512


def prompt_length(tiny_dir, request) -> int:
    return len(ChatTemplate(load_tokenizer(tiny_dir)).encode_prompt(request.messages))


def test_an_answer_streams_and_ends_with_exact_counts(make_engine, make_request, ask, tiny_dir):
    request = make_request(max_tokens=30)
    listener = ask(make_engine(), request).wait()
    last = listener.finished[0]
    assert (last.reason, last.completion_tokens) == (FinishReason.LENGTH, 30)
    assert last.prompt_tokens == prompt_length(tiny_dir, request)
    assert len(listener.words) > 10  # it came in pieces


def test_max_tokens_is_exact_down_to_one(make_engine, make_request, ask):
    engine = make_engine()
    for limit in (1, 2, 3):
        assert ask(engine, make_request(max_tokens=limit)).wait().finished[0].completion_tokens == limit


def test_without_max_tokens_an_answer_ends_with_the_context(make_engine, make_request, ask):
    last = ask(make_engine(), make_request()).wait().finished[0]
    assert last.reason is FinishReason.LENGTH
    assert last.prompt_tokens + last.completion_tokens == CONTEXT


def test_a_stop_string_ends_the_answer_and_is_not_shown(make_engine, make_request, ask):
    engine = make_engine()
    whole = ask(engine, make_request(max_tokens=40, temperature=1.0, seed=3)).wait().text()
    stop = whole[10:13]
    listener = ask(engine, make_request(max_tokens=40, temperature=1.0, seed=3, stop=(stop, "never"))).wait()
    assert listener.text() == whole[: whole.index(stop)]
    assert listener.finished[0].reason is FinishReason.STOP
    assert listener.finished[0].completion_tokens < 40


def test_the_end_of_turn_token_ends_the_answer_and_is_not_counted(make_engine, make_request, ask):
    """The tiny model draws it now and then at a high temperature."""
    engine = make_engine()
    requests = [make_request(temperature=2.0, seed=seed, max_tokens=300) for seed in range(6)]
    listeners = [ask(engine, request) for request in requests]
    stopped = [listener for listener in listeners if listener.wait().finished[0].reason is FinishReason.STOP]
    assert stopped
    for listener in stopped:
        assert listener.finished[0].completion_tokens < 300
        assert "<|im_end|>" not in listener.text()


def test_a_seed_gives_the_same_answer_alone_and_in_a_crowd(make_engine, make_request, ask, adapters):
    engine = make_engine()
    sampling = {"temperature": 1.2, "top_p": 0.9, "seed": 11, "max_tokens": 40}
    alone = ask(engine, make_request(**sampling)).wait().text()
    crowd = [
        ask(engine, make_request("Hello", tuned=tuned, temperature=1.0, max_tokens=60)) for tuned in adapters
    ]
    again = ask(engine, make_request(**sampling)).wait()
    assert again.text() == alone
    for listener in crowd:
        listener.wait()


def test_without_a_seed_answers_differ(make_engine, make_request, ask):
    engine = make_engine()
    texts = {ask(engine, make_request(temperature=1.5, max_tokens=30)).wait().text() for _ in range(3)}
    assert len(texts) == 3


def test_choices_are_what_each_would_be_alone(make_engine, make_request, ask):
    """More choices than rows: some copy the prompt of a running choice, some compute it again."""
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 25}
    wide = ask(make_engine(max_batch=3), make_request(n=7, **sampling)).wait()
    narrow = ask(make_engine(max_batch=1), make_request(n=7, **sampling)).wait()
    assert sorted(wide.finished) == list(range(7))
    texts = [wide.text(index) for index in range(7)]
    assert texts == [narrow.text(index) for index in range(7)]
    assert len(set(texts)) == 7


def test_choices_sent_back_for_lack_of_memory_go_on_where_they_were(make_engine, make_request, ask, adapters):
    # With an adapter, as the bare random model hardly cares what stands before a token.
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 150, "n": 6, "tuned": adapters[2]}
    tight = make_engine(max_batch=6, kv_bytes=CONTEXT * KV_TOKEN_BYTES)
    ample = make_engine(max_batch=6)
    listeners = [ask(engine, make_request(**sampling)).wait() for engine in (tight, ample)]
    assert tight.stats().preemptions > 0
    assert [listeners[0].text(index) for index in range(3)] == [
        listeners[1].text(index) for index in range(3)
    ]


def test_a_prompt_longer_than_the_context_is_refused_with_numbers_and_a_cure(
    make_engine, make_request, ask, tiny_dir
):
    request = make_request("order " * 600)
    failed = ask(make_engine(), request).wait().failed
    assert (failed.status, failed.code, failed.param) == (400, "context_length_exceeded", "messages")
    assert "512" in failed.message
    assert str(prompt_length(tiny_dir, request)) in failed.message
    assert "reduce" in failed.message


def test_prompt_and_max_tokens_must_fit_the_context_together(make_engine, make_request, ask, tiny_dir):
    engine = make_engine()
    room = CONTEXT - prompt_length(tiny_dir, make_request())
    assert ask(engine, make_request(max_tokens=room)).wait().finished[0].completion_tokens == room
    failed = ask(engine, make_request(max_tokens=room + 1)).wait().failed
    assert failed.code == "context_length_exceeded"
    assert f"at most {room}" in failed.message


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "user", "content": 7}], [{"content": "x"}]]
)
def test_messages_the_template_cannot_render_never_stop_the_engine(make_engine, make_request, ask, messages):
    engine = make_engine()
    listener = ask(engine, make_request(messages=messages, max_tokens=2)).wait()
    assert listener.finished or (listener.failed.status, listener.failed.param) == (400, "messages")
    assert ask(engine, make_request(max_tokens=2)).wait().finished


def test_cancel_frees_the_row_within_a_step_and_silences_the_request(make_engine, make_request, ask):
    engine = make_engine(max_batch=1)
    leaving, waiting = ask(engine, make_request()), ask(engine, make_request(max_tokens=3))
    assert leaving.first.wait(10)
    engine.cancel(leaving_id := "chatcmpl-1")
    said = len(leaving.words)
    waiting.wait()
    assert len(leaving.words) <= said + 1  # one may have been on its way
    assert not leaving.done.is_set()
    engine.cancel(leaving_id)  # cancelling twice, or something unknown, is harmless
    until(lambda: engine.stats().running == 0 and engine.stats().kv_tokens == 0)


def test_a_cancelled_request_leaves_the_line_too(make_engine, make_request, ask):
    engine = make_engine(max_batch=1)
    running = ask(engine, make_request(max_tokens=200))
    ask(engine, make_request(id="gone", n=3))
    engine.cancel("gone")
    running.wait()
    until(lambda: engine.stats().waiting == 0 and engine.stats().running == 0)


def test_a_request_whose_time_is_over_before_its_first_word_times_out(make_engine, make_request, ask):
    engine = make_engine(max_batch=1)
    running = ask(engine, make_request(max_tokens=400))
    failed = ask(engine, make_request(expires_at=time.time() + 0.05)).wait().failed
    assert (failed.status, failed.code) == (503, "timeout")
    assert running.wait().finished  # it began in time and may take as long as it needs


def test_a_started_answer_outlives_its_deadline(make_engine, make_request, ask):
    listener = ask(make_engine(), make_request(expires_at=time.time() + 0.15, max_tokens=450)).wait()
    assert listener.finished[0].completion_tokens == 450


def test_no_word_is_lost_when_many_threads_ask_at_once(make_engine, make_request, adapters):
    engine = make_engine(max_batch=4, adapter_bytes=20_000, kv_bytes=900 * KV_TOKEN_BYTES)
    weights = [None, *adapters]
    requests = [
        make_request(
            "Thank you. " * (i % 9 + 1),
            tuned=weights[i % 4],
            n=1 + i % 3,
            max_tokens=3 + i % 20,
            temperature=1.0,
        )
        for i in range(60)
    ]
    listeners = [Listener(request) for request in requests]

    def send(part: int) -> None:
        for request, listener in list(zip(requests, listeners, strict=True))[part::6]:
            engine.submit(request, listener)
            if request.id.endswith("7"):
                engine.cancel(request.id)

    threads = [threading.Thread(target=send, args=(part,)) for part in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request, listener in zip(requests, listeners, strict=True):
        if not request.id.endswith("7"):
            assert sorted(listener.wait().finished) == list(range(request.sampling.n))
    until(lambda: (engine.stats().running, engine.stats().waiting, engine.stats().kv_tokens) == (0, 0, 0))
    assert engine.stats().errors == 0


def test_memory_for_rows_stays_within_the_budget(make_engine, make_request, ask):
    engine = make_engine(max_batch=8, kv_bytes=768 * KV_TOKEN_BYTES)
    listeners = [ask(engine, make_request(max_tokens=200)) for _ in range(8)]
    for listener in listeners:
        assert listener.wait().finished[0].completion_tokens == 200
        assert engine.stats().kv_tokens_reserved <= 768
    assert engine.stats().preemptions > 0


def test_a_budget_smaller_than_the_context_shortens_it_and_says_so(make_engine, make_request, ask):
    engine = make_engine(kv_bytes=300 * KV_TOKEN_BYTES + 1)
    last = ask(engine, make_request()).wait().finished[0]
    assert last.prompt_tokens + last.completion_tokens == 300
    failed = ask(engine, make_request("order " * 300)).wait().failed
    assert failed.code == "context_length_exceeded"
    assert "maximum context length is 300 tokens" in failed.message
    with pytest.raises(ValueError, match="hold 255 tokens of this model; give it at least 131072"):
        make_engine(kv_bytes=256 * KV_TOKEN_BYTES - 1)


def test_a_message_delivered_twice_is_answered_once(make_engine, make_request, ask):
    engine = make_engine()
    request = make_request(max_tokens=20)
    first, second = ask(engine, request), ask(engine, request)
    first.wait()
    assert second.words == []


def test_a_listener_that_fails_loses_only_its_own_request(make_engine, make_request, ask):
    engine = make_engine()

    def broken(_words) -> None:
        raise ConnectionError("nobody there")

    engine.submit(make_request(), broken)
    assert ask(engine, make_request(max_tokens=5)).wait().finished
    until(lambda: engine.stats().running == 0)
    assert engine.alive


def test_stopping_tells_everybody_and_a_stopped_engine_answers_at_once(make_engine, make_request, ask):
    engine = make_engine(max_batch=1)
    assert engine.alive
    running, waiting = ask(engine, make_request()), ask(engine, make_request())
    assert running.first.wait(10)
    engine.stop()
    late = ask(engine, make_request())
    for listener in (running, waiting, late):
        assert (listener.wait().failed.status, listener.failed.code) == (503, "engine_stopped")
    assert not engine.alive
