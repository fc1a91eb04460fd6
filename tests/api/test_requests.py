"""What holds for every route: keys, errors, headers, limits, and the wall between projects."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from sqlalchemy.orm import Session, sessionmaker
from starlette.routing import BaseRoute

from app.api.dependencies import OPEN_PATHS
from app.api.main import create_app
from app.core import keys
from app.core.base_models import DEFAULT_BASE_MODEL
from app.core.db import transaction
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.tables import ApiKey
from tests.api.conftest import MAX_BODY_BYTES, Tenant
from tests.api.expecting import assert_refused
from tests.api.servers import api_server, send_raw
from tests.factories import (
    make_file,
    make_finished_job,
    make_stored_completion,
    make_stored_response,
)

MESSAGES = [{"role": "user", "content": "hi"}]


def all_routes() -> list[tuple[str, str]]:
    """Method and path of every route there is, also of those the description leaves out."""
    app = create_app(Settings(database_url="postgresql+psycopg://nobody/none", redis_url="redis://nobody"))

    def walk(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
        for route in routes:
            inner = getattr(route, "original_router", None)
            if inner is not None:
                yield from walk(inner.routes)
            else:
                assert isinstance(route, APIRoute), f"{route} is not covered by the key"
                yield from ((method, route.path) for method in route.methods or ())

    return sorted(walk(app.routes))


ROUTES = all_routes()


def fill(path: str, id: str = "some-id") -> str:
    """A path with its parameters filled in."""
    return re.sub(r"{[^}]+}", id, path)


def test_there_are_the_routes_that_the_walk_is_about() -> None:
    paths = {path for _, path in ROUTES}
    assert len(ROUTES) >= 19
    assert {"/v1/files", "/v1/fine_tuning/jobs/{job_id}/cancel", "/v1/models/{model:path}"} <= paths


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_but_the_listed_ones_answers_without_a_key(
    stranger: httpx.Client, method: str, path: str
) -> None:
    answer = stranger.request(method, fill(path))
    if path in OPEN_PATHS:
        assert answer.status_code in (200, 503)
    else:
        assert_refused(answer, 401, code="invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["Bearer", "Basic abc", "Bearer sk-wrong", "Bearer ' OR 1=1 --", ""])
def test_a_wrong_key_is_refused(stranger: httpx.Client, header: str) -> None:
    assert_refused(stranger.get("/v1/models", headers={"authorization": header}), 401, code="invalid_api_key")


def test_a_revoked_key_is_refused_at_once(tenant: Tenant, sessions: sessionmaker[Session]) -> None:
    assert tenant.http.get("/v1/models").status_code == 200
    with transaction(sessions) as session:
        for key in session.query(ApiKey):
            keys.revoke_key(session, key.id)
    assert_refused(tenant.http.get("/v1/models"), 401, code="invalid_api_key")


def test_a_body_is_not_looked_at_before_the_key(stranger: httpx.Client) -> None:
    assert_refused(stranger.post("/v1/chat/completions", content=b"{"), 401, code="invalid_api_key")


def test_another_projects_ids_answer_exactly_like_ids_that_do_not_exist(
    tenant: Tenant, neighbour: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        job = make_finished_job(session, storage, project=neighbour.project)
        foreign = {"file_id": job.training_file, "job_id": job.id, "model:path": job.fine_tuned_model or ""}
        foreign["completion_id"] = make_stored_completion(session, project=neighbour.project).id
        foreign["response_id"] = make_stored_response(session, project=neighbour.project).id
    walked = 0
    for method, path in ROUTES:
        for parameter in re.findall(r"{([^}]+)}", path):
            walked += 1
            answers = [
                tenant.http.request(
                    method, fill(path, id), json={"metadata": None} if method == "POST" else None
                )
                for id in (foreign[parameter], "absent-id")
            ]
            assert [answer.status_code for answer in answers] == [404, 404], (method, path)
            texts = [
                answer.text.replace(id, "ID")
                for answer, id in zip(answers, (foreign[parameter], "absent-id"), strict=True)
            ]
            assert texts[0] == texts[1]
            if method == "GET":
                assert neighbour.http.get(fill(path, foreign[parameter])).status_code == 200
    assert walked >= 9


@pytest.mark.parametrize("field", ["training_file", "validation_file", "model"])
def test_another_projects_ids_in_a_job_answer_like_absent_ones(
    tenant: Tenant, neighbour: Tenant, sessions: sessionmaker[Session], storage: Storage, field: str
) -> None:
    with transaction(sessions) as session:
        job = make_finished_job(session, storage, project=neighbour.project)
        own = make_file(session, storage, project=tenant.project)
    foreign = {"model": job.fine_tuned_model or "", "training_file": job.training_file}
    texts = set()
    for value in (foreign.get(field, job.training_file), "absent-id"):
        body = {"model": DEFAULT_BASE_MODEL, "training_file": own.id, field: value}
        answer = tenant.http.post("/v1/fine_tuning/jobs", json=body)
        code = "model_not_available" if field == "model" else "invalid_value"
        assert_refused(answer, 400, code=code, param=field)
        texts.add(answer.text.replace(value, "ID"))
    assert len(texts) == 1


def test_another_projects_model_in_chat_answers_like_an_absent_one(
    tenant: Tenant, neighbour: Tenant, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        name = make_finished_job(session, storage, project=neighbour.project).fine_tuned_model or ""
    for model in (name, "absent"):
        answer = tenant.http.post("/v1/chat/completions", json={"model": model, "messages": MESSAGES})
        assert_refused(answer, 404, code="model_not_found", param="model")


@pytest.mark.parametrize("path", ["files", "fine_tuning/jobs"])
def test_another_projects_id_is_no_cursor(
    tenant: Tenant, neighbour: Tenant, sessions: sessionmaker[Session], storage: Storage, path: str
) -> None:
    with transaction(sessions) as session:
        job = make_finished_job(session, storage, project=neighbour.project)
    foreign = job.id if path.endswith("jobs") else job.training_file
    for after in (foreign, "absent", "a\0b"):
        answer = tenant.http.get(f"/v1/{path}", params={"after": after})
        assert_refused(answer, 400, code=None, param="after")


@pytest.mark.parametrize(
    "id", ["a/b", "a%2Fb", "..%2F..%2Fetc%2Fpasswd", "%00", "%ff%fe", "a" * 2000, "'--", "☃"]
)
@pytest.mark.parametrize(
    "path", ["/v1/files/{}", "/v1/files/{}/content", "/v1/fine_tuning/jobs/{}", "/v1/models/{}"]
)
def test_an_id_nobody_gave_out_is_not_found(tenant: Tenant, server_url: str, path: str, id: str) -> None:
    head = f"GET {path.format(id)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    key = f"Authorization: Bearer {tenant.secret}\r\n\r\n"
    answer = send_raw(server_url, (head + key).encode())
    if id == "☃":  # not a legal request line
        assert answer.startswith(b"HTTP/1.1 4")
    else:
        assert answer.startswith(b"HTTP/1.1 404 "), answer
        assert b'"error":' in answer


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nothing", "/v1/files/", "/v1/fine_tuning/jobs/a/b/c", "/metrics"]
)
def test_an_unknown_path_gets_the_envelope(tenant: Tenant, path: str) -> None:
    answer = tenant.http.get(path)
    if path != "/v1/files/":
        assert_refused(answer, 404, code="unknown_url")
    assert answer.status_code == 404


def test_a_wrong_method_names_the_right_ones(tenant: Tenant) -> None:
    answer = tenant.http.put("/v1/files", json={})
    assert_refused(answer, 405, code="method_not_supported", says="GET, POST")
    assert answer.headers["allow"] == "GET, POST"


def test_every_answer_carries_an_id_of_its_own_and_the_version(tenant: Tenant) -> None:
    answers = [tenant.http.get(path) for path in ("/healthz", "/v1/models", "/v1/nothing", "/v1/files/x")]
    ids = {answer.headers["x-request-id"] for answer in answers}
    assert len(ids) == 4
    assert all(re.fullmatch(r"req_\w{24}", id) for id in ids)
    assert {answer.headers["openai-version"] for answer in answers} == {"2020-10-01"}
    assert all(answer.headers["openai-processing-ms"].isdigit() for answer in answers)


JSON_FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no body"),
    "not JSON": (b"{", "not valid JSON"),
    "NaN": (b'{"temperature": NaN}', "NaN"),
    "infinity": (b'{"temperature": 1e999}', "too large"),
    "duplicate key": (b'{"model": "a", "model": "b"}', "duplicate key 'model'"),
    "lone surrogate": (b'{"model": "\\ud800"}', "surrogate"),
    "not UTF-8": (b'{"model": "\xff"}', "UTF-8"),
    "nested too deep": (b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested deeper"),
    "a huge integer": (b'{"seed": ' + b"9" * 10_000 + b"}", "too many digits"),
}


@pytest.mark.parametrize("case", JSON_FAULTS)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/fine_tuning/jobs"])
def test_a_body_that_is_not_clean_json_is_refused(tenant: Tenant, path: str, case: str) -> None:
    body, says = JSON_FAULTS[case]
    answer = tenant.http.post(path, content=body, headers={"content-type": "application/json"})
    assert_refused(answer, 400, code="invalid_json", says=says)


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"x"'])
def test_a_body_that_is_no_object_is_refused(tenant: Tenant, body: bytes) -> None:
    assert_refused(tenant.http.post("/v1/fine_tuning/jobs", content=body), 400, code="invalid_type")


def test_a_body_of_another_type_is_refused_by_name(tenant: Tenant) -> None:
    answer = tenant.http.post("/v1/fine_tuning/jobs", data={"model": "x"})
    assert_refused(answer, 400, code="unsupported_content_type", says="application/x-www-form-urlencoded")


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_over_the_limit_is_refused_before_it_is_read(tenant: Tenant, chunked: bool) -> None:
    whole = b" " * (20 * MAX_BODY_BYTES)
    body: Any = (whole[i : i + 65536] for i in range(0, len(whole), 65536)) if chunked else whole
    answer = tenant.http.post("/v1/fine_tuning/jobs", content=body)
    assert_refused(answer, 413, code="request_too_large", says="200000 bytes")


def test_a_client_that_waits_to_be_asked_for_its_body_is_answered_at_once(
    tenant: Tenant, server_url: str
) -> None:
    head = (
        "POST /v1/fine_tuning/jobs HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nConnection: close\r\n"
        f"Authorization: Bearer {tenant.secret}\r\nContent-Length: 999999999\r\n\r\n"
    )
    assert send_raw(server_url, head.encode()).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("query", ["limit=0", "limit=101", "limit=ten", "limit=1.5", "colour=red"])
def test_a_bad_query_is_refused_by_name(tenant: Tenant, query: str) -> None:
    answer = tenant.http.get(f"/v1/fine_tuning/jobs?{query}")
    codes = {"limit=0": "integer_below_min_value", "limit=101": "integer_above_max_value"}
    code = codes.get(query, "unknown_parameter" if "colour" in query else "invalid_type")
    assert_refused(answer, 400, code=code, param=query.split("=")[0])


def test_without_a_database_the_answer_is_to_come_back(settings: Settings) -> None:
    gone = settings.model_copy(update={"database_url": "postgresql+psycopg://a:b@127.0.0.1:1/c"})
    with api_server(gone) as url, httpx.Client(base_url=url, timeout=30) as client:
        answer = client.get("/v1/models", headers={"authorization": "Bearer sk-anything"})
        assert_refused(answer, 503, code="service_unavailable", says="database")
        assert answer.headers["retry-after"] == "5"
        assert client.get("/healthz").status_code == 200


def test_without_a_broker_jobs_are_created_and_chat_says_come_back(
    tenant: Tenant, settings: Settings, sessions: sessionmaker[Session], storage: Storage
) -> None:
    with transaction(sessions) as session:
        file = make_file(session, storage, project=tenant.project)
    gone = settings.model_copy(update={"redis_url": "redis://127.0.0.1:1/0"})
    headers = {"authorization": f"Bearer {tenant.secret}"}
    with api_server(gone) as url, httpx.Client(base_url=url, timeout=30, headers=headers) as client:
        body: dict[str, Any] = {"model": DEFAULT_BASE_MODEL, "training_file": file.id}
        assert client.post("/v1/fine_tuning/jobs", json=body).json()["status"] == "validating_files"
        body = {"model": DEFAULT_BASE_MODEL, "messages": MESSAGES}
        answer = client.post("/v1/chat/completions", json=body)
        assert_refused(answer, 503, code="service_unavailable", says="broker")
        assert answer.headers["retry-after"] == "5"


def test_an_unexpected_failure_says_nothing_of_the_inside(
    tenant: Tenant, settings: Settings, sessions: sessionmaker[Session], tmp_path: Any
) -> None:
    with transaction(sessions) as session:
        file = make_file(session, Storage(settings.storage_dir), project=tenant.project)
        path = settings.storage_dir / file.storage_key
        path.unlink()
        path.mkdir()  # reading it raises IsADirectoryError, with the path in its text
    answer = tenant.http.get(f"/v1/files/{file.id}/content")
    assert_refused(answer, 500, code=None)
    assert str(settings.storage_dir) not in answer.text
    assert "IsADirectory" not in answer.text


@pytest.mark.parametrize(
    "request_", [b"no HTTP at all\r\n\r\n", b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"]
)
def test_what_is_no_http_gets_the_envelope_too(server_url: str, request_: bytes) -> None:
    head, _, body = send_raw(server_url, request_).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-request-id: req_" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def test_the_log_names_the_request_and_neither_key_nor_words(
    tenant: Tenant, sessions: sessionmaker[Session], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    body = {"model": "canary-model", "messages": [{"role": "user", "content": "canary-words"}]}
    tenant.http.post("/v1/chat/completions?canary-query=1", json=body)
    tenant.http.get("/v1/files/a%0Ab")
    time.sleep(0.1)  # the line is written after the answer
    own = [record for record in caplog.records if record.name.startswith("app.")]
    lines = [record.getMessage() for record in own]
    assert any(line.startswith("POST /v1/chat/completions 404 in ") for line in lines)
    assert any("/v1/files/a?b 404" in line for line in lines)
    assert not any("canary" in line or tenant.secret in line for line in lines)
