"""Liveness, readiness, and the description of the API."""

from __future__ import annotations

import time

import httpx
import redis

from app.core.presence import announce, withdraw
from app.core.redis_client import make_redis
from app.core.settings import Settings
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
