"""The proxy does what faults rely on, against the real servers."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
import redis
from sqlalchemy import make_url

from tests.chaos.proxy import Mode, Proxy


@pytest.fixture
def line(database_url: str) -> Iterator[Proxy]:
    """A line to the database."""
    proxy = Proxy(make_url(database_url).port or 0)
    yield proxy
    proxy.close()


def through(url: str, proxy: Proxy) -> str:
    """The same server, behind the proxy."""
    return make_url(url).set(port=proxy.port, drivername="postgresql").render_as_string(hide_password=False)


def test_a_commit_that_is_cut_off_has_happened_and_its_answer_has_not(line: Proxy, database_url: str) -> None:
    direct = make_url(database_url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(direct, autocommit=True) as admin:
        admin.execute("CREATE TABLE IF NOT EXISTS cut (word text)")
        line.cut_after_commit(b"INSERT INTO cut")
        client = psycopg.connect(through(database_url, line))
        client.execute("INSERT INTO cut VALUES ('once')")
        with pytest.raises(psycopg.OperationalError):
            client.commit()
        client.close()
        assert line.fired.is_set()
        assert admin.execute("SELECT word FROM cut").fetchall() == [("once",)]
        admin.execute("DROP TABLE cut")


def test_a_refusing_line_takes_no_client_and_a_healed_one_does(line: Proxy, database_url: str) -> None:
    with psycopg.connect(through(database_url, line)) as client:
        line.break_off(Mode.REFUSE)
        with pytest.raises(psycopg.OperationalError):
            client.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(through(database_url, line), connect_timeout=3)
    line.heal()
    with psycopg.connect(through(database_url, line)) as client:
        assert client.execute("SELECT 1").fetchone() == (1,)


def test_one_reply_is_swallowed_and_what_it_carried_is_gone(redis_url: str) -> None:
    proxy = Proxy(make_url(redis_url).port or 0)
    url = make_url(redis_url).set(port=proxy.port).render_as_string(hide_password=False)
    with redis.Redis.from_url(redis_url) as direct, redis.Redis.from_url(url, socket_timeout=1) as client:
        direct.lpush("hints", "the hint")
        proxy.swallow_reply(b"the hint")
        with pytest.raises(redis.TimeoutError):
            client.brpop(["hints"], timeout=1)
        assert proxy.fired.is_set()
        assert direct.llen("hints") == 0
        direct.lpush("hints", "the next")
        assert client.brpop(["hints"], timeout=1) == (b"hints", b"the next")
        direct.delete("hints")
    proxy.close()
