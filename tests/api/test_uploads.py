"""Uploads over real sockets: what is kept, what is refused, and that nothing of the refused is left."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session, sessionmaker

from app.core.db import transaction
from app.core.storage import Storage
from app.core.tables import File
from tests.api.conftest import MAX_FILE_BYTES, Tenant
from tests.api.expecting import assert_refused, stored
from tests.api.servers import send_raw

DATA = b'{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n' * 12
BOUNDARY = "luthier-boundary"


def form(*parts: tuple[str, bytes], end: str = "--") -> bytes:
    """A form of parts, each with the parameters of its Content-Disposition and its body."""
    body = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
        for head, data in parts
    )
    return body + f"--{BOUNDARY}{end}\r\n".encode()


def post(tenant: Tenant, body: bytes | Iterator[bytes], *, boundary: str = BOUNDARY) -> httpx.Response:
    """Send a form as it is."""
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return tenant.http.post("/v1/files", content=body, headers=headers)


PURPOSE = ('name="purpose"', b"fine-tune")
FILE = ('name="file"; filename="a.jsonl"', DATA)


@pytest.fixture
def nothing_left(sessions: sessionmaker[Session], storage: Storage) -> Iterator[None]:
    """After the test neither a row nor a byte is there."""
    yield
    deadline = time.monotonic() + 5  # a client that leaves is noticed a moment later
    while stored(storage) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert stored(storage) == []
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(File)) == 0


def test_a_file_is_kept_byte_for_byte_with_its_digest(
    tenant: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    answer = tenant.http.post("/v1/files", files={"file": ("a.jsonl", DATA)}, data={"purpose": "fine-tune"})
    assert answer.status_code == 200, answer.text
    file = answer.json()
    assert (file["bytes"], file["filename"], file["status"]) == (len(DATA), "a.jsonl", "processed")
    assert file["expires_at"] is None
    content = tenant.http.get(f"/v1/files/{file['id']}/content")
    assert content.content == DATA
    assert content.headers["content-length"] == str(len(DATA))
    with sessions() as session:
        row = session.get_one(File, file["id"])
        assert row.sha256 == hashlib.sha256(DATA).hexdigest()
    assert stored(storage) == [f"files/{file['id']}"]


def test_the_order_of_the_parts_does_not_matter(tenant: Tenant) -> None:
    for parts in ((FILE, PURPOSE), (PURPOSE, FILE)):
        assert post(tenant, form(*parts)).status_code == 200


def test_a_file_that_looks_like_a_form_is_kept_whole(tenant: Tenant) -> None:
    tricky = b"\r\n--luthier-boundarY\r\n\r\n--luthier-bound\r--\n\r\n--" * 5000
    answer = post(tenant, form(('name="file"; filename="a"', tricky), PURPOSE))
    assert tenant.http.get(f"/v1/files/{answer.json()['id']}/content").content == tricky


def test_a_file_of_exactly_the_limit_is_taken(tenant: Tenant) -> None:
    body = form(('name="file"; filename="a"', b"x" * MAX_FILE_BYTES), PURPOSE)
    assert post(tenant, body).json()["bytes"] == MAX_FILE_BYTES


def test_an_empty_file_is_taken_since_bad_data_fails_the_job(tenant: Tenant) -> None:
    assert post(tenant, form(('name="file"; filename="a"', b""), PURPOSE)).json()["bytes"] == 0


def test_a_file_expires_when_asked_and_a_batch_file_after_thirty_days(tenant: Tenant) -> None:
    anchor = ('name="expires_after[anchor]"', b"created_at")
    file = post(tenant, form(FILE, PURPOSE, anchor, ('name="expires_after[seconds]"', b"3600"))).json()
    assert file["expires_at"] == file["created_at"] + 3600
    file = post(tenant, form(FILE, ('name="purpose"', b"batch"))).json()
    assert file["expires_at"] == file["created_at"] + 30 * 86400


@pytest.mark.parametrize(
    ("sent", "shown"),
    [
        ("../../etc/passwd", "passwd"),
        ("/abs/olute.jsonl", "olute.jsonl"),
        ("C:\\dir\\x.jsonl", "x.jsonl"),
        ("ünïcode 猫.jsonl", "ünïcode 猫.jsonl"),
        ("a" * 1000, "a" * 255),
        ("..", ".."),
        ("CON", "CON"),
    ],
)
def test_a_filename_is_only_ever_shown(tenant: Tenant, storage: Storage, sent: str, shown: str) -> None:
    file = post(tenant, form((f'name="file"; filename="{sent}"', DATA), PURPOSE)).json()
    assert file["filename"] == shown
    assert stored(storage) == [f"files/{file['id']}"]
    content = tenant.http.get(f"/v1/files/{file['id']}/content")
    assert content.headers["content-disposition"].isascii()


REFUSED: dict[str, tuple[bytes, int, str, str | None]] = {
    "no file": (form(PURPOSE), 400, "missing_required_parameter", "file"),
    "no purpose": (form(FILE), 400, "missing_required_parameter", "purpose"),
    "two files": (form(FILE, FILE, PURPOSE), 400, "invalid_value", "file"),
    "two purposes": (form(FILE, PURPOSE, PURPOSE), 400, "invalid_value", "purpose"),
    "file without a filename": (form(('name="file"', DATA), PURPOSE), 400, "invalid_value", "file"),
    "empty filename": (form(('name="file"; filename=""', b""), PURPOSE), 400, "invalid_value", "file"),
    "wrong purpose": (form(FILE, ('name="purpose"', b"fun")), 400, "invalid_value", "purpose"),
    "purpose evals": (form(FILE, ('name="purpose"', b"evals")), 400, "invalid_value", "purpose"),
    "purpose of results": (
        form(FILE, ('name="purpose"', b"fine-tune-results")),
        400,
        "invalid_value",
        "purpose",
    ),
    "unknown field": (form(FILE, PURPOSE, ('name="color"', b"red")), 400, "unknown_parameter", "color"),
    "long field": (
        form(FILE, ('name="purpose"', b"x" * 5000)),
        400,
        "string_above_max_length",
        "purpose",
    ),
    "nameless part": (form(FILE, PURPOSE, ('filename="x"', b"")), 400, "invalid_form", None),
    "2,000 parts": (
        form(FILE, *((f'name="f{i}"', b"") for i in range(2000))),
        400,
        "unknown_parameter",
        "f0",
    ),
    "no end": (form(FILE, PURPOSE, end=""), 400, "invalid_form", None),
    "cut short": (form(FILE, PURPOSE)[:200], 400, "invalid_form", None),
    "empty body": (b"", 400, "invalid_form", None),
    "no form": (b"\x1f\x8b not a form at all", 400, "invalid_form", None),
    "huge part header": (form((f'name="file"; filename="{"a" * 20000}"', DATA)), 400, "invalid_form", None),
    "only anchor": (
        form(FILE, PURPOSE, ('name="expires_after[anchor]"', b"created_at")),
        400,
        "missing_required_parameter",
        "expires_after[seconds]",
    ),
    "only seconds": (
        form(FILE, PURPOSE, ('name="expires_after[seconds]"', b"3600")),
        400,
        "missing_required_parameter",
        "expires_after[anchor]",
    ),
    "too large": (
        form(('name="file"; filename="a"', b"x" * (MAX_FILE_BYTES + 1)), PURPOSE),
        413,
        "file_too_large",
        "file",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_form_is_refused_and_leaves_nothing(tenant: Tenant, nothing_left: None, case: str) -> None:
    body, status, code, param = REFUSED[case]
    assert_refused(post(tenant, body), status, code=code, param=param)


@pytest.mark.parametrize("boundary", ["", "x" * 71, "other"])
def test_a_bad_boundary_is_refused(tenant: Tenant, nothing_left: None, boundary: str) -> None:
    assert_refused(post(tenant, form(FILE, PURPOSE), boundary=boundary), 400, code="invalid_form")


@pytest.mark.parametrize(
    ("seconds", "code"),
    [
        (b"3599", "integer_below_min_value"),
        (b"2592001", "integer_above_max_value"),
        (b"soon", "invalid_type"),
        (b"-1", "invalid_type"),
        (b"1e9", "invalid_type"),
        (b"9" * 200, "invalid_type"),
    ],
)
def test_an_expiry_out_of_range_is_refused(
    tenant: Tenant, nothing_left: None, seconds: bytes, code: str
) -> None:
    anchor = ('name="expires_after[anchor]"', b"created_at")
    answer = post(tenant, form(FILE, PURPOSE, anchor, ('name="expires_after[seconds]"', seconds)))
    assert_refused(answer, 400, code=code, param="expires_after[seconds]", says="3600")


def test_a_body_of_another_kind_is_refused(tenant: Tenant, nothing_left: None) -> None:
    answer = tenant.http.post("/v1/files", json={"purpose": "fine-tune"})
    assert_refused(answer, 400, code="unsupported_content_type", says="multipart/form-data")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_file_far_over_the_limit_gets_its_answer_though_the_client_still_sends(
    tenant: Tenant, nothing_left: None, chunked: bool
) -> None:
    whole = form(('name="file"; filename="a"', b"x" * (30 * MAX_FILE_BYTES)), PURPOSE)
    body: Any = (whole[i : i + 65536] for i in range(0, len(whole), 65536)) if chunked else whole
    assert_refused(post(tenant, body), 413, code="file_too_large", param="file", says="1000000 bytes")


def test_a_client_that_leaves_in_the_middle_leaves_nothing(
    tenant: Tenant, server_url: str, storage: Storage, nothing_left: None
) -> None:
    head = _head(tenant, length=500_000)
    send_raw(server_url, head + form(FILE, PURPOSE)[:400], leave=True)


def test_a_content_length_above_what_comes_leaves_nothing(
    tenant: Tenant, server_url: str, nothing_left: None
) -> None:
    body = form(FILE, PURPOSE)
    answer = send_raw(server_url, _head(tenant, length=len(body) + 1000) + body, finish=True)
    assert b" 200 " not in answer.split(b"\r\n")[0]


def test_a_content_length_below_what_comes_is_refused(
    tenant: Tenant, server_url: str, nothing_left: None
) -> None:
    body = form(FILE, PURPOSE)
    answer = send_raw(server_url, _head(tenant, length=300) + body)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_form"' in answer


def test_an_upload_beyond_the_projects_room_is_refused(
    tenant: Tenant, sessions: sessionmaker[Session], nothing_left: None, storage: Storage
) -> None:
    file = post(tenant, form(FILE, PURPOSE)).json()
    with transaction(sessions) as session:
        session.get_one(File, file["id"]).size_bytes = 3_000 * 10**9
    assert_refused(post(tenant, form(FILE, PURPOSE)), 413, code="storage_quota", says="Delete files")
    with transaction(sessions) as session:
        session.delete(session.get_one(File, file["id"]))
    storage.delete(f"files/{file['id']}")


def _head(tenant: Tenant, *, length: int) -> bytes:
    return (
        "POST /v1/files HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        f"Authorization: Bearer {tenant.secret}\r\nContent-Length: {length}\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
    ).encode()
