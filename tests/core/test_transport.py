"""The way to a broker that refuses: connect again and again, and keep nothing of what failed."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

import kombu
import kombu.entity
import psutil
import pytest
import redis
from kombu.asynchronous import Hub
from sqlalchemy import make_url

from app.core.queue import SOCKET_OPTIONS
from app.core.redis_client import make_redis


def open_lines(redis_url: str) -> int:
    """Connections of this process to the broker."""
    port = make_url(redis_url).port
    lines = psutil.Process(os.getpid()).net_connections(kind="tcp")
    return sum(1 for line in lines if line.raddr and line.raddr.port == port and line.status == "ESTABLISHED")


@pytest.mark.parametrize("refused", ["while it waits for messages", "before"])
def test_a_consumer_whose_broker_turns_read_only_leaves_no_connection_behind(
    redis_url: str, refused: str
) -> None:
    with make_redis(redis_url) as broker:
        broker.ping()
        before = open_lines(redis_url)
        for _ in range(3):
            listen_to_a_broker_that_refuses(redis_url, broker, at_once=refused == "before")
        assert open_lines(redis_url) <= before


def listen_to_a_broker_that_refuses(redis_url: str, broker: redis.Redis, *, at_once: bool) -> None:
    """One life of a consumer's connection, as Celery leads it."""
    connection = kombu.Connection(
        redis_url, transport="app.core.transport:Transport", transport_options=dict(SOCKET_OPTIONS)
    )
    try:
        if at_once:
            broker.replicaof("127.0.0.1", 1)
        with suppress(*connection.connection_errors, *connection.channel_errors):
            connection.ensure_connection(max_retries=1)
            connection.transport.register_with_event_loop(connection.connection, Hub())
            queue = kombu.entity.Queue("refused", kombu.entity.Exchange("refused"), routing_key="refused")
            kombu.Consumer(connection.channel(), [queue], callbacks=[]).consume()
            with suppress(socket.timeout):
                connection.drain_events(timeout=0.2)  # a BRPOP is on its way from here on
            broker.replicaof("127.0.0.1", 1)
            with suppress(Exception):  # as Celery closes one that has been at work
                connection.close()
    finally:
        broker.replicaof("NO", "ONE")
