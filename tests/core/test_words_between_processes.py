"""What processes tell each other through the broker: words, presence, hints."""

from __future__ import annotations

import socket
import time

import pytest
import redis

from app.core import presence
from app.core.completions import Delta, Failed, Finished, FinishReason, Word
from app.core.queue import SOCKET_OPTIONS, Sender, Task, inference_queue, make_celery
from app.core.settings import Settings
from app.core.token_stream import CANCELS, Entry, WordPost, WordWriter, decode, publish_entries, reply_stream
from tests.core.rows import make_sender

WORDS: list[Word] = [
    Delta(index=0, text="a \u2028 \N{GRINNING FACE} \0 \x85"),
    Finished(index=1, reason=FinishReason.LENGTH, prompt_tokens=3, completion_tokens=4),
    Failed(status=400, code="context_length_exceeded", message="Too long", param="messages"),
]


def test_words_come_back_as_they_were_sent_and_in_order(client: redis.Redis) -> None:
    stream = reply_stream("me")
    first, second = (WordWriter(reply_to=stream, request_id=id) for id in ("r1", "r2"))
    publish_entries(client, [first.entry(WORDS), second.entry(WORDS[:1])])
    publish_entries(client, [first.entry(WORDS[1:])])
    entries = [decode(fields) for _, fields in client.xrange(stream)]  # type: ignore[union-attr]
    assert entries == [Entry("r1", 0, WORDS), Entry("r2", 0, WORDS[:1]), Entry("r1", 1, WORDS[1:])]
    assert 0 < client.ttl(stream) <= 3600  # type: ignore[operator]


def test_words_given_to_the_post_arrive_in_order_and_a_flush_sees_them_out(client: redis.Redis) -> None:
    stream = reply_stream("post")
    post, writer = WordPost(client), WordWriter(reply_to=stream, request_id="r1")
    for _ in range(300):
        post.put(writer.entry(WORDS[:1]))
    assert post.flush(timeout_s=20)
    numbers = [decode(fields).number for _, fields in client.xrange(stream)]  # type: ignore[union-attr]
    assert numbers == list(range(300))


def test_a_broker_that_is_away_costs_words_but_no_time_and_is_named_once(
    client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    stream = reply_stream("away")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()  # takes connections and never says a word
        mute = redis.Redis(port=server.getsockname()[1], socket_timeout=0.2, retry=None)
        post, writer = WordPost(mute), WordWriter(reply_to=stream, request_id="r1")
        began = time.monotonic()
        for _ in range(50):
            post.put(writer.entry(WORDS[:1]))
        assert time.monotonic() - began < 0.2
        for _ in range(2):
            post.put(writer.entry(WORDS[:1]))
            assert post.flush(timeout_s=20)
        mute.close()
    assert caplog.text.count("words are lost") == 1
    post._client = client  # it is back
    post.put(writer.entry(WORDS[:1]))
    assert post.flush(timeout_s=20)
    [(_, fields)] = client.xrange(stream)  # type: ignore[misc, union-attr]
    assert decode(fields).number == 52  # the gap shows


def test_a_cancel_reaches_whoever_listens(client: redis.Redis) -> None:
    with client.pubsub(ignore_subscribe_messages=True) as listener:  # type: ignore[no-untyped-call]
        listener.subscribe(CANCELS)
        listener.get_message(timeout=1)
        client.publish(CANCELS, "r1")
        message = listener.get_message(timeout=5)
    assert message is not None
    assert message["data"] == b"r1"


def test_a_worker_is_present_until_it_falls_silent_or_leaves(client: redis.Redis) -> None:
    presence.announce(client, kind="inference", worker="a", about={"base_models": ["tiny"]}, ttl_s=60)
    presence.announce(client, kind="inference", worker="b", about={}, ttl_s=0.05)
    presence.announce(client, kind="training", worker="c", about={}, ttl_s=60)
    time.sleep(0.1)
    assert presence.list_present(client, kind="inference") == [{"base_models": ["tiny"]}]
    presence.withdraw(client, kind="inference", worker="a")
    assert presence.list_present(client, kind="inference") == []


def test_hints_go_to_the_queue_of_their_workers(client: redis.Redis, redis_url: str) -> None:
    sender = make_sender(redis_url)
    sender.hint(Task.RUN_JOB, "j1")
    sender.hint(Task.RUN_JOB, "j2")
    sender.hint(Task.VALIDATE_JOB, "j1")
    assert sender.flush(timeout_s=20)
    sender.send(Task.COMPLETE, inference_queue("tiny"), {})
    assert (sender.backlog(Task.RUN_JOB), sender.backlog(Task.VALIDATE_JOB)) == (2, 1)
    assert client.llen("inference.tiny") == 1


def test_texts_of_users_stay_out_of_message_headers(client: redis.Redis, redis_url: str) -> None:
    make_sender(redis_url).send(Task.COMPLETE, "q", {"messages": "private words"})
    [raw] = client.lrange("q", 0, -1)  # type: ignore[misc]
    assert b"private words" not in raw  # the body is base64; headers are what logs show


@pytest.mark.parametrize("mute", [False, True], ids=["refused", "mute"])
def test_a_hint_to_a_broker_that_is_away_returns_at_once_and_raises_nothing(mute: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if mute:
            server.listen()
        sender = make_sender(f"redis://127.0.0.1:{server.getsockname()[1]}/0")
        began = time.monotonic()
        for _ in range(2000):  # more than may wait
            sender.hint(Task.RUN_JOB, "j1")
        assert time.monotonic() - began < 2


def test_a_sender_works_again_after_its_connections_were_cut(client: redis.Redis, redis_url: str) -> None:
    sender: Sender = make_sender(redis_url)
    for _ in range(3):
        client.client_kill_filter(_type="normal", skipme=True)
        sender.hint(Task.RUN_JOB, "j1")
        assert sender.flush(timeout_s=20)
    sender.hint(Task.RUN_JOB, "j2")
    assert sender.flush(timeout_s=20)
    assert client.llen("training") >= 2  # type: ignore[operator]


def test_no_connection_of_a_worker_can_hang_for_good() -> None:
    options = make_celery(Settings(redis_url="redis://127.0.0.1:1/0")).conf
    assert options.broker_transport_options == SOCKET_OPTIONS
    assert 0 < SOCKET_OPTIONS["socket_timeout"] <= 30
    assert 0 < SOCKET_OPTIONS["socket_connect_timeout"] <= 30
    assert SOCKET_OPTIONS["socket_keepalive"] is True
    assert options.accept_content == ["json"]
    assert options.task_acks_late is False
    assert options.worker_prefetch_multiplier == 1
