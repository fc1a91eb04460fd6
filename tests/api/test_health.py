"""Liveness, readiness, and the description of the API."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import redis

from app.core.presence import announce, announce_deaf, withdraw
from app.core.redis_client import make_redis
from app.core.settings import Settings
from tests.api.conftest import Tenant
from tests.api.expecting import assert_refused
from tests.api.servers import api_server

KINDS = ("control", "training", "inference")


def parts(answer: httpx.Response) -> dict[str, str]:
    """What readiness says of each part."""
    found: dict[str, str] = answer.json()["parts"]
    return found


def test_ready_means_that_every_part_is_there(stranger: httpx.Client, redis_url: str) -> None:
    client: redis.Redis = make_redis(redis_url)
    for kind in KINDS:
        announce(client, kind=kind, worker="w1", about={"base_models": []}, ttl_s=30)
    answer = stranger.get("/readyz")
    assert (answer.status_code, answer.json()["status"]) == (200, "ready")
    assert set(parts(answer)) == {"database", "broker", "storage", *KINDS}
    assert set(parts(answer).values()) == {"ok"}
    for kind in KINDS:
        withdraw(client, kind=kind, worker="w1")
        answer = stranger.get("/readyz")
        assert (answer.status_code, parts(answer)[kind]) == (503, "no worker")
    client.close()


def test_a_worker_that_is_silent_is_soon_missed(stranger: httpx.Client, redis_url: str) -> None:
    with make_redis(redis_url) as client:
        announce(client, kind="training", worker="w1", about={}, ttl_s=60)
        assert parts(stranger.get("/readyz"))["training"] == "ok"
        announce(client, kind="training", worker="w1", about={}, ttl_s=0.05)  # its last word
        deadline = time.monotonic() + 30
        while parts(stranger.get("/readyz"))["training"] != "no worker":
            assert time.monotonic() < deadline, "a silent worker is not missed"
            time.sleep(0.05)


def test_workers_that_live_but_hear_nothing_are_told_apart(stranger: httpx.Client, redis_url: str) -> None:
    with make_redis(redis_url) as client:
        for kind in KINDS:
            announce(client, kind=kind, worker="w1", about={}, ttl_s=30)
        announce_deaf(client, kind="training", worker="w2", ttl_s=30)
        answer = stranger.get("/readyz")
        assert (answer.status_code, parts(answer)["training"]) == (200, "ok, deaf: 1 of 2")
        announce_deaf(client, kind="training", worker="w1", ttl_s=30)
        answer = stranger.get("/readyz")
        assert (answer.status_code, parts(answer)["training"]) == (503, "deaf: 2 of 2")
        announce(client, kind="training", worker="w1", about={}, ttl_s=30)  # it hears again
        withdraw(client, kind="training", worker="w2")
        assert parts(stranger.get("/readyz"))["training"] == "ok"
        for kind in KINDS:
            withdraw(client, kind=kind, worker="w1")


def test_without_database_and_broker_readiness_says_so_and_liveness_stays(settings: Settings) -> None:
    secrets = {
        "database_url": "postgresql+psycopg://a:geheim@127.0.0.1:1/c",
        "redis_url": "redis://:geheim@127.0.0.1:1/0",
    }
    with (
        api_server(settings.model_copy(update=secrets)) as url,
        httpx.Client(base_url=url, timeout=10) as client,
    ):
        answer = client.get("/readyz")
        assert answer.status_code == 503
        found = parts(answer)
        assert (found["database"], found["broker"], found["storage"]) == ("not reachable",) * 2 + ("ok",)
        assert "geheim" not in answer.text
        assert client.get("/healthz").status_code == 200


def test_a_storage_that_cannot_be_written_is_not_ready(settings: Settings, tmp_path: object) -> None:
    other = settings.model_copy(update={"data_dir": settings.data_dir / "other"})
    with api_server(other) as url, httpx.Client(base_url=url) as client:
        assert parts(client.get("/readyz"))["storage"] == "ok"
        (other.storage_dir / "tmp").rmdir()
        assert parts(client.get("/readyz"))["storage"] == "not writable"


def test_files_on_a_disk_that_is_gone_are_not_said_to_be_gone(
    tenant: Tenant, settings: Settings, tmp_path: Path
) -> None:
    other = settings.model_copy(update={"data_dir": tmp_path})
    with (
        api_server(other) as url,
        httpx.Client(base_url=url, headers=tenant.http.headers, timeout=30) as client,
    ):
        form: dict[str, Any] = {"files": {"file": ("a", b"x")}, "data": {"purpose": "fine-tune"}}
        file = client.post("/v1/files", **form).json()
        other.storage_dir.rename(tmp_path / "unmounted")
        for answer in (client.get(f"/v1/files/{file['id']}/content"), client.post("/v1/files", **form)):
            assert_refused(answer, 503, code="service_unavailable", says="storage")
        (tmp_path / "unmounted").rename(other.storage_dir)
        assert client.get(f"/v1/files/{file['id']}/content").content == b"x"


def test_the_page_of_the_api_loads_nothing_from_elsewhere(stranger: httpx.Client) -> None:
    page = stranger.get("/docs")
    assert page.status_code == 200
    assert "POST /v1/fine_tuning/jobs" in page.text
    assert "<script" not in page.text
    assert "http" not in page.text.replace("http-equiv", "")


def test_the_description_resolves_all_its_references(stranger: httpx.Client) -> None:
    description = stranger.get("/openapi.json").json()
    schemas = description["components"]["schemas"]
    assert {"CreateJob", "CreateChatCompletion", "FileObject"} <= set(schemas)

    def references(value: object) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*(references(item) for item in value.values()))
        if isinstance(value, list):
            return set().union(*(references(item) for item in value))
        return set()

    assert {name.rpartition("/")[2] for name in references(description)} <= set(schemas)
