"""Clients that leave, dawdle or never finish: whatever they held is soon free again."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from app.api import middleware, protocol
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.completions import CompletionRequest, Delta, Finished, FinishReason, Word
from app.core.settings import Settings
from app.core.storage import Storage
from tests.api.conftest import Tenant
from tests.api.expecting import stored
from tests.api.servers import api_server, connect
from tests.api.workers import InferenceWorker

BOUNDARY = "b"
TIMES = 50


def upload_head(tenant: Tenant, *, length: int) -> bytes:
    """The headers of an upload, and its file's beginning."""
    return (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\n"
        f"Authorization: Bearer {tenant.secret}\r\nContent-Length: {length}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    ).encode()


def until(condition: Callable[[], object], *, within_s: float, why: str) -> None:
    """Wait for it."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.02)


def test_uploads_left_in_the_middle_leave_neither_bytes_nor_descriptors(
    tenant: Tenant, server_url: str, storage: Storage
) -> None:
    tenant.http.get("/v1/files")
    process = psutil.Process()
    before, threads = process.num_fds(), threading.active_count()
    crowd = [connect(server_url) for _ in range(TIMES)]
    for connection in crowd:
        connection.sendall(upload_head(tenant, length=900_000) + b"x" * 600_000)
    until(lambda: len(stored(storage)) == TIMES, within_s=20, why="not all uploads have begun")
    for connection in crowd:
        connection.close()
    until(lambda: stored(storage) == [], within_s=5, why="bytes are left")
    until(lambda: process.num_fds() <= before + 32, within_s=5, why="descriptors are left")  # the pools'
    assert threading.active_count() <= threads + 45  # anyio's pool, which is bounded


def test_streams_left_in_the_middle_stop_the_generation(
    tenant: Tenant, server_url: str, worker: InferenceWorker
) -> None:
    worker.script = lambda _request: [[Delta(index=0, text="so far")]]
    body = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    process = psutil.Process()
    before = process.num_fds()
    with contextlib.ExitStack() as stack:
        for _ in range(TIMES):
            http = stack.enter_context(
                httpx.Client(base_url=server_url, headers=tenant.http.headers, timeout=30)
            )
            answer = stack.enter_context(http.stream("POST", "/v1/chat/completions", json=body))
            next(answer.iter_lines())
    asked = {request.id for request in worker.requests}
    assert len(asked) == TIMES
    until(lambda: asked <= set(worker.cancels), within_s=5, why="the engine still works for who has left")
    until(lambda: process.num_fds() <= before + 32, within_s=5, why="descriptors are left")


@pytest.fixture
def strict_url(settings: Settings, tenant: Tenant, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that waits for one second where others wait for twenty."""
    for module, name in ((protocol, "HEADER_S"), (middleware, "BODY_GAP_S")):
        assert getattr(module, name) <= 25, "slow clients are to be gone within 30 s"
        monkeypatch.setattr(module, name, 1.0)
    with api_server(settings) as url:
        yield url


def trickle(connection: socket.socket, data: bytes, *, every_s: float = 0.1) -> tuple[float, bytes]:
    """Send byte by byte until the other side closes; how long it took, and what it said."""
    began, said = time.monotonic(), b""
    connection.settimeout(every_s)
    for byte in data:
        with contextlib.suppress(OSError):
            connection.sendall(bytes([byte]))
        try:
            piece = connection.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            break
        if not piece:
            break
        said += piece
    return time.monotonic() - began, said


def test_headers_that_trickle_end_the_connection(strict_url: str) -> None:
    with connect(strict_url) as connection:
        took, said = trickle(connection, b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 100)
    assert took < 8
    assert said.startswith(b"HTTP/1.1 408 ")


def test_headers_of_a_second_request_that_trickle_end_the_connection_too(strict_url: str) -> None:
    with connect(strict_url) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        took, said = trickle(connection, b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 100)
    assert took < 8
    assert b"HTTP/1.1 408 " in said


def test_a_connection_without_a_request_is_closed(strict_url: str) -> None:
    with connect(strict_url) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("secret", [True, False], ids=["with a key", "without"])
def test_a_body_that_trickles_ends_the_connection(
    strict_url: str, tenant: Tenant, storage: Storage, monkeypatch: pytest.MonkeyPatch, secret: bool
) -> None:
    monkeypatch.setattr(middleware, "LINGER_S", 1.0)
    head = upload_head(tenant, length=900_000)
    with connect(strict_url) as connection:
        connection.sendall(head if secret else head.replace(tenant.secret.encode(), b"none"))
        took, said = trickle(connection, b"x" * 300)
    assert took < 10
    assert said.startswith(b"HTTP/1.1 408 " if secret else b"HTTP/1.1 401 ")
    until(lambda: stored(storage) == [], within_s=5, why="bytes are left")


def test_a_body_that_comes_steadily_may_take_long(strict_url: str, tenant: Tenant) -> None:
    def pieces() -> Iterator[bytes]:
        yield upload_head(tenant, length=0).partition(b"\r\n\r\n")[2]
        for _ in range(20):
            time.sleep(0.15)
            yield b"x" * 500
        purpose = b'Content-Disposition: form-data; name="purpose"\r\n\r\nfine-tune'
        yield b"\r\n--b\r\n" + purpose + b"\r\n--b--\r\n"

    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}", **tenant.http.headers}
    answer = httpx.post(f"{strict_url}/v1/files", content=pieces(), headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text


def test_an_answer_that_takes_longer_than_headers_may_is_not_cut(
    strict_url: str, tenant: Tenant, worker: InferenceWorker
) -> None:
    def speak_slowly(request: CompletionRequest) -> list[list[Word]]:
        for _ in range(6):
            worker.answer(request, [Delta(index=0, text="la")])
            time.sleep(0.5)
        return [[Finished(index=0, reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=6)]]

    worker.script = speak_slowly
    body = {"model": DEFAULT_BASE_MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
    answer = httpx.post(
        f"{strict_url}/v1/chat/completions", json=body, headers=tenant.http.headers, timeout=30
    )
    assert answer.text.count('"la"') == 6
    assert answer.text.endswith("data: [DONE]\n\n")
