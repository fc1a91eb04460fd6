"""A worker cut from the database stops its child before anyone else may start."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
import time
from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from app.core import attempts
from app.core.attempts import Attempt
from app.core.db import make_engine, make_sessions, transaction
from app.core.status import JobStatus
from app.core.tables import Job
from tests.worker.desk import Desk, child_of, running, wait_for, warm
from worker.context import make_context
from worker.runner import Runner
from worker.trainer import Trainer


class Proxy:
    """Passes bytes to the database; `mute` makes it hold them back, `cut` breaks all connections."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._flowing = threading.Event()
        self._flowing.set()
        self._pairs: list[socket.socket] = []
        self._closed = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def mute(self) -> None:
        self._flowing.clear()

    def cut(self) -> None:
        self.close()

    def close(self) -> None:
        self._closed = True
        with suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # wakes `accept`, which would take one caller more
        self._server.close()
        self._flowing.set()
        for end in self._pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while not self._closed:
                near, _ = self._server.accept()
                far = socket.create_connection(self._target)
                self._pairs += [near, far]
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=self._copy, args=(a, b), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._flowing.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("how", ["cut", "mute"])
def test_a_worker_cut_from_the_database_stops_its_child_before_the_lease_ends(
    desk: Desk, trainer: Trainer, database_url: str, how: str
) -> None:
    warm(trainer)
    child = child_of(trainer)
    url = make_url(database_url)
    proxy = Proxy(url.host or "127.0.0.1", url.port or 5432)
    through = url.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
    engine = make_engine(through)
    far = desk.with_settings(lease_s=4.0)
    context = dataclasses.replace(far.context, sessions=make_sessions(engine))
    job_id = desk.queue(n_epochs=50, batch_size=1, luthier={"adapter": "lora", "rank": 64})
    runner = Runner(context, trainer)

    def work() -> None:
        with suppress(DBAPIError):  # the next claim, while the database is away
            runner.run_waiting()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_for(running(desk, job_id))
        getattr(proxy, how)()
        wait_for(lambda: not _alive(child), timeout_s=8)
        job = desk.job(job_id)
        assert job.lease_expires_at is not None
        with transaction(desk.context.sessions) as session:
            assert job.lease_expires_at > _database_time(session)
        assert job.status is JobStatus.RUNNING
    finally:
        runner.stopping.set()
        proxy.close()
        thread.join(timeout=30)
        engine.dispose()
    assert not thread.is_alive()


def _alive(pid: int) -> bool:
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _database_time(session: Session) -> object:
    return session.scalar(text("SELECT clock_timestamp()"))


def test_a_worker_frozen_while_it_writes_to_its_job_lets_go_of_the_row_before_its_lease_ends(
    desk: Desk, sessions: sessionmaker[Session]
) -> None:
    job_id = desk.queue()
    context = make_context(desk.context.settings.model_copy(update={"lease_s": 1.0}))
    with context.sessions() as frozen:
        job = attempts.claim_job(frozen, worker="frozen", lease_s=1.0)
        assert job is not None
        frozen.commit()
        attempts.renew_lease(frozen, Attempt(job_id, 1), lease_s=1.0)  # and here it stops
        with sessions() as other:
            began = time.monotonic()
            other.get_one(Job, job_id, with_for_update=True)
            assert time.monotonic() - began < 1.0
        with pytest.raises(DBAPIError):
            frozen.commit()
        frozen.invalidate()
