"""docker-compose.yml and the Dockerfiles against the code: each command, path, extra and variable exists.

No container is started: whoever builds the images finds no name that the code does not know.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import redis
import yaml
from fastapi.testclient import TestClient
from typer.main import get_command

from app.api.main import create_app
from app.cli.embedded import find_free_port
from app.cli.main import app as cli
from app.cli.valkey import find_valkey, wait_for_valkey
from app.core import presence
from app.core.queue import Queue
from app.core.redis_client import make_redis
from app.core.settings import Settings
from tests.structure.sources import ROOT

TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
WORKERS = [name for name in OURS if "--queues" in OURS[name]["command"]]
DOCKERFILES = ["Dockerfile.api", "Dockerfile.worker"]
# Variables of compose itself, of the images of others, and of pip; all others must be settings.
FOREIGN = {
    *("COMPOSE_PROFILES", "POSTGRES_PASSWORD", "POSTGRES_USER", "POSTGRES_DB", "VALKEY_PASSWORD"),
    *("TRAINING_GPU", "INFERENCE_GPU", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "BASE_IMAGE", "PATH"),
    "PYTHONUNBUFFERED",
}


def dockerfile(name: str) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments; continued lines joined, comments gone."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def parse_command(words: list[str]) -> None:
    """Let the command's own parser read the words; nothing runs."""
    command: Any = get_command(cli)
    for position, word in enumerate(words):
        if not hasattr(command, "commands"):
            command.make_context("luthier", words[position:])
            return
        command = command.commands[word]
    command.make_context("luthier", [])


@pytest.mark.parametrize("name", OURS)
def test_every_command_of_compose_is_one_of_ours(name: str) -> None:
    parse_command(OURS[name]["command"])


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    for words in (["sing"], ["worker", "--queue", "training"], ["worker"], ["models", "push"]):
        with pytest.raises(Exception, match=r"No such option|Missing option|sing|push"):
            parse_command(words)


def test_compose_has_the_processes_of_the_design() -> None:
    expected = {"postgres", "valkey", "migrate", "api", "control", "training", "inference"}
    assert expected <= set(SERVICES)
    queues = {OURS[name]["command"][-1] for name in WORKERS}
    assert queues == {str(queue) for queue in Queue}


def test_every_queue_is_worked_with_a_gpu_and_without() -> None:
    for profile in ("gpu", "cpu"):
        active = [name for name in WORKERS if OURS[name].get("profiles", [profile]) == [profile]]
        assert sorted(OURS[name]["command"][-1] for name in active) == sorted(map(str, Queue))


def test_the_two_gpu_services_and_no_others_reserve_a_gpu() -> None:
    reserving = {name for name, service in SERVICES.items() if "deploy" in service}
    assert reserving == {"training", "inference"}
    for name in reserving:
        [device] = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert SERVICES[name]["profiles"] == ["gpu"]


def test_what_compose_builds_exists() -> None:
    for service in OURS.values():
        assert service["build"]["context"] == "."
        path = ROOT / service["build"]["dockerfile"]
        known = {rest.partition("=")[0] for word, rest in dockerfile(path.name) if word == "ARG"}
        assert set(service["build"].get("args", {})) <= known
    builds = {service["image"]: service["build"] for service in OURS.values()}
    assert all(service["build"] == builds[service["image"]] for service in OURS.values())


def test_dependencies_and_volumes_are_defined() -> None:
    for service in SERVICES.values():
        for name, need in service.get("depends_on", {}).items():
            needed = SERVICES[name]
            if need["condition"] == "service_healthy":
                assert "test" in needed["healthcheck"]
            else:
                assert needed["restart"] == "no"
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert volumes <= set(COMPOSE["volumes"])


def test_a_service_depends_on_none_that_its_profile_leaves_out() -> None:
    for service in SERVICES.values():
        for name in service.get("depends_on", {}):
            assert SERVICES[name].get("profiles") in (None, service.get("profiles"))


def is_checked(service: dict[str, Any]) -> bool:
    """Whether a health check is in the service or in the image it builds."""
    if "healthcheck" in service:
        return "test" in service["healthcheck"]
    return any(word == "HEALTHCHECK" for word, _ in dockerfile(service["build"]["dockerfile"]))


def test_every_service_that_stays_says_how_it_is_and_comes_back() -> None:
    staying = {name: service for name, service in SERVICES.items() if service["restart"] != "no"}
    assert [name for name, service in staying.items() if not is_checked(service)] == []
    assert {service["restart"] for service in staying.values()} == {"unless-stopped"}


def variables() -> Iterator[str]:
    """Names of all variables that compose or a Dockerfile sets or reads."""
    yield from re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", TEXT)
    for service in SERVICES.values():
        yield from service.get("environment", {})
        yield from service.get("build", {}).get("args", {})
    for name in DOCKERFILES:
        for word, rest in dockerfile(name):
            if word == "ENV":
                yield from (pair.partition("=")[0] for pair in shlex.split(rest))


def test_every_variable_is_a_setting() -> None:
    settings = {f"LUTHIER_{name.upper()}" for name in Settings.model_fields}
    assert set(variables()) - settings - FOREIGN == set()
    assert len(set(variables()) & settings) > 4


def test_what_must_be_set_is_asked_for_and_passwords_have_no_default() -> None:
    asked = set(re.findall(r"\$\{([A-Z_]+):\?", TEXT))
    assert asked == {"COMPOSE_PROFILES", "POSTGRES_PASSWORD", "VALKEY_PASSWORD"}
    assert re.findall(r"\$\{[A-Z_]*PASSWORD:-", TEXT) == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_a_dockerfile_copies_exists_and_reaches_the_build(name: str) -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for word, rest in dockerfile(name):
        if word == "COPY" and not rest.startswith("--from"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in let_in


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_installs_an_extra_that_exists(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    [extra] = re.findall(r"'\.\[(\w+)\]'", (ROOT / name).read_text(encoding="utf-8"))
    assert extra == name.removeprefix("Dockerfile.")
    assert extra in project["optional-dependencies"]
    assert any(word == "ENTRYPOINT" and rest == '["luthier"]' for word, rest in dockerfile(name))
    assert "luthier" in project["scripts"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_does_not_run_as_root(name: str) -> None:
    instructions = dockerfile(name)
    last_stage = max(place for place, (word, _) in enumerate(instructions) if word == "FROM")
    assert ("USER", "luthier") in instructions[last_stage:]


def test_the_images_share_the_owner_of_the_data_volume() -> None:
    assert {re.findall(r"--uid (\d+)", (ROOT / name).read_text())[0] for name in DOCKERFILES} == {"10001"}


def test_valkey_takes_its_password_from_standard_input(tmp_path: Path) -> None:
    command = [word.replace("$$", "$") for word in SERVICES["valkey"]["command"]]
    port = find_free_port()
    (tmp_path / "valkey-server").symlink_to(find_valkey())
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VALKEY_PASSWORD": "geheim"}
    command[-1] = command[-1].replace("valkey-server -", f"valkey-server - --bind 127.0.0.1 --port {port}", 1)
    with subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for_valkey(f"redis://:geheim@127.0.0.1:{port}/0")
            with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
                stranger.ping()
            with redis.Redis(port=port, password="geheim") as client:
                settings = client.config_get("*")
            assert (settings["maxmemory"], settings["maxmemory-policy"]) == (str(512 * 2**20), "noeviction")
            assert (settings["save"], settings["appendonly"]) == ("", "no")
            assert "geheim" not in " ".join(psutil.Process(process.pid).cmdline() + command)
        finally:
            process.terminate()  # the shell has become the server, so a stop reaches it
        assert process.wait(timeout=10) == 0


def test_the_api_image_asks_a_route_that_exists(database_url: str, redis_url: str, tmp_path: Path) -> None:
    [path] = re.findall(r"http://127\.0\.0\.1:8000(/\w+)", (ROOT / "Dockerfile.api").read_text())
    settings = Settings(database_url=database_url, redis_url=redis_url, data_dir=tmp_path)
    with TestClient(create_app(settings)) as client:
        assert client.get(path).status_code == 200


def test_a_worker_is_healthy_while_it_says_that_it_lives(redis_url: str, tmp_path: Path) -> None:
    test = SERVICES["training"]["healthcheck"]["test"]
    assert test[:2] == ["CMD", "python"]
    environment = {**os.environ, "LUTHIER_REDIS_URL": redis_url}

    def is_healthy() -> bool:
        return (
            subprocess.run([sys.executable, *test[2:]], env=environment, cwd=tmp_path, timeout=60).returncode
            == 0
        )

    client = make_redis(redis_url)
    assert not is_healthy()
    presence.announce(client, kind="training", worker=f"{socket.gethostname()}-1", about={}, ttl_s=60)
    assert is_healthy()
    presence.withdraw(client, kind="training", worker=f"{socket.gethostname()}-1")
    assert not is_healthy()
    client.close()
