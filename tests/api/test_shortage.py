"""A service short of descriptors or of disk: it says so, loses nothing, and recovers without a restart."""

from __future__ import annotations

import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app.core.settings import Settings
from app.core.tables import File
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.processes import api_process
from tests.api.servers import connect

CAN_MOUNT = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture
def cramped(tenant: Tenant, settings: Settings) -> Iterator[str]:
    """A server that may open 64 files."""
    with api_process(settings, through=["prlimit", "--nofile=64"], drain=True) as (process, url):
        yield url
        assert process.poll() is None, "it has ended"


def upload(http: httpx.Client, data: bytes) -> httpx.Response:
    """Upload a file."""
    return http.post("/v1/files", files={"file": ("a.jsonl", data)}, data={"purpose": "fine-tune"})


def test_with_few_descriptors_all_are_answered_and_it_recovers(tenant: Tenant, cramped: str) -> None:
    def work(number: int) -> list[int]:
        statuses = []
        for _ in range(5):
            with httpx.Client(base_url=cramped, headers=tenant.http.headers, timeout=30) as http:
                try:
                    answer = upload(http, b"x" * 1000) if number % 2 else http.get("/v1/files")
                    statuses.append(answer.status_code)
                    if answer.status_code != 200:
                        assert "retry-after" in answer.headers
                except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
                    statuses.append(0)  # refused while it still sent
        return statuses

    with ThreadPoolExecutor(100) as pool:
        counts = Counter(status for statuses in pool.map(work, range(100)) for status in statuses)
    assert set(counts) <= {0, 200, 503}
    assert counts[200], counts
    assert counts[503], counts
    with httpx.Client(base_url=cramped, headers=tenant.http.headers) as http:
        assert upload(http, b"x").status_code == 200


def test_idle_connections_that_use_all_descriptors_are_refused_and_leave_room_again(
    tenant: Tenant, cramped: str
) -> None:
    crowd: list[socket.socket] = []
    try:
        for _ in range(150):
            crowd.append(connect(cramped))
        answer = crowd[40].recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after" in answer
    finally:
        for connection in crowd:
            connection.close()
    deadline = time.monotonic() + 5
    while True:
        try:
            answered = httpx.get(f"{cramped}/v1/files", headers=tenant.http.headers, timeout=10)
            if answered.status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "it does not recover"
        time.sleep(0.05)


@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace of its own, as root has it")
def test_an_upload_onto_a_full_disk_is_507_and_leaves_neither_row_nor_bytes(
    tenant: Tenant, settings: Settings, sessions: sessionmaker[Session], tmp_path: Path
) -> None:
    small = settings.model_copy(update={"data_dir": tmp_path / "data"})
    folder = small.storage_dir
    folder.mkdir(parents=True)
    mount = f'mount -t tmpfs -o size=1m none {folder} && exec "$@"'
    with (
        api_process(small, through=["unshare", "--mount", "sh", "-c", mount, "sh"], drain=True) as (
            process,
            url,
        ),
        httpx.Client(base_url=url, headers=tenant.http.headers, timeout=30) as http,
    ):
        inside = Path(f"/proc/{process.pid}/root{folder}")
        with sessions() as session:
            before = session.scalar(select(func.count()).select_from(File))
        assert upload(http, b"x" * 600_000).status_code == 200
        for _ in range(3):
            assert_refused(upload(http, b"x" * 600_000), 507, code="storage_full")
        assert list((inside / "tmp").iterdir()) == []
        assert len(list((inside / "files").iterdir())) == 1
        with sessions() as session:
            assert session.scalar(select(func.count()).select_from(File)) == (before or 0) + 1
        [kept] = http.get("/v1/files").json()["data"]
        assert http.delete(f"/v1/files/{kept['id']}").status_code == 200
        (inside / "files" / kept["id"]).unlink(missing_ok=True)  # as housekeeping does
        assert upload(http, b"x" * 600_000).status_code == 200
