"""What an operator sees when something is wrong: one sentence with the cure, exit code 1, no traceback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from app.cli.process_commands import child_environment
from app.core.presence import announce, announce_deaf, withdraw
from app.core.redis_client import make_redis

ROOT = Path(__file__).parents[2]


def luthier(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    return subprocess.run(
        [sys.executable, "-m", "app.cli.main", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | variables,
        timeout=120,
    )


def assert_refused(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1, done.stdout
    assert last.startswith("luthier: ")
    assert sentence in last
    assert "Traceback" not in done.stdout + done.stderr


def processes_of(folder: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words:
            found.append(words)
    return found


def test_a_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = luthier("up", "--port", str(port), "--data-dir", str(tmp_path / "data"))
    assert_refused(
        done, f"Port {port} is in use by process {os.getpid()}; stop that or choose another with --port"
    )
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"up.lock"}


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    done = luthier("up", "--host", "192.0.2.1", "--port", "0", "--data-dir", str(tmp_path))
    assert_refused(done, "192.0.2.1 is no address of this machine; give --host 127.0.0.1")


def test_a_file_in_the_place_of_the_data_dir_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(
        luthier("up", "--data-dir", str(tmp_path / "file")), "is not a folder; give another --data-dir"
    )


def test_a_start_that_fails_leaves_nothing_running(tmp_path: Path) -> None:
    catalogue = tmp_path / "models.toml"
    catalogue.write_text('[models.mine]\nsource = "file:///no/such"\ncontext_length = 8\nlicence = "MIT"\n')
    done = luthier(
        "up",
        "--port",
        "0",
        "--data-dir",
        str(tmp_path / "data"),
        LUTHIER_MODELS_FILE=str(catalogue),
        LUTHIER_INFERENCE_MODELS="mine",
    )
    assert_refused(done, "`luthier models pull mine` did not succeed; the line above says why")
    assert "/no/such of base model 'mine' holds no config.json" in done.stderr
    assert processes_of(tmp_path) == []
    assert not (tmp_path / "data" / "secrets" / "urls.json").exists()


def test_a_model_that_is_not_in_the_catalogue_is_refused(tmp_path: Path) -> None:
    done = luthier("models", "pull", "gpt-4o", "--data-dir", str(tmp_path))
    assert_refused(done, "'gpt-4o' is not in the catalogue; it holds smollm2-135m-instruct")


def test_a_database_that_is_away_is_one_sentence() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"postgresql+psycopg://u:p@127.0.0.1:{closed.getsockname()[1]}/luthier"
        done = luthier("keys", "list", LUTHIER_DATABASE_URL=url)
    assert_refused(done, "start it, or correct LUTHIER_DATABASE_URL")


def test_a_command_without_a_database_says_where_one_comes_from(tmp_path: Path) -> None:
    done = luthier("keys", "list", "--data-dir", str(tmp_path))
    assert_refused(done, "No database: set LUTHIER_DATABASE_URL, or start luthier up")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"LUTHIER_PORT": "many"}, "LUTHIER_PORT cannot be used: Input should be a valid integer"),
        ({"LUTHIER_STORAGE_URL": "ftp://x"}, "LUTHIER_STORAGE_URL cannot be used"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(variables: dict[str, str], sentence: str) -> None:
    assert_refused(luthier("doctor", **variables), sentence)


def test_a_worker_without_servers_or_with_an_unknown_queue_is_refused() -> None:
    assert_refused(luthier("worker", "--queues", "control"), "must be set; or run luthier up")
    assert_refused(
        luthier("worker", "--queues", "gpu"), "--queues must be some of control,training,inference"
    )


def test_keys_are_made_listed_and_revoked(database_url: str) -> None:
    made = luthier("keys", "create", "--name", "ci", "--project", "robots", LUTHIER_DATABASE_URL=database_url)
    assert made.stdout.startswith("sk-")
    assert len(made.stdout.split()) == 1
    key_id = next(word.rstrip(";") for word in made.stderr.split() if word.startswith("key_"))
    listed = luthier("keys", "list", LUTHIER_DATABASE_URL=database_url).stdout
    assert key_id in listed
    assert made.stdout.strip() not in listed
    revoked = luthier("keys", "revoke", key_id, LUTHIER_DATABASE_URL=database_url)
    assert revoked.stdout == f"{key_id} is revoked.\n"
    assert "revoked" in luthier("keys", "list", LUTHIER_DATABASE_URL=database_url).stdout
    assert_refused(
        luthier("keys", "revoke", "key_x", LUTHIER_DATABASE_URL=database_url), "No such key: key_x"
    )


def test_migrating_twice_changes_nothing(database_url: str) -> None:
    for _ in range(2):
        assert luthier("migrate", LUTHIER_DATABASE_URL=database_url).stdout == "The database is up to date.\n"


def test_doctor_finds_all_well_where_all_is_well(database_url: str, redis_url: str, tmp_path: Path) -> None:
    done = luthier(
        "doctor", "--data-dir", str(tmp_path), LUTHIER_DATABASE_URL=database_url, LUTHIER_REDIS_URL=redis_url
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert lines[0].startswith("ok   database    PostgreSQL 18")
    assert any(line.startswith("ok   broker      Valkey 9") for line in lines)
    assert any("run luthier models pull smollm2-135m-instruct" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_doctor_names_workers_that_hear_nothing(database_url: str, redis_url: str, tmp_path: Path) -> None:
    with make_redis(redis_url) as client:
        announce(client, kind="training", worker="w1", about={}, ttl_s=60)
        announce_deaf(client, kind="training", worker="w2", ttl_s=60)
        done = luthier(
            "doctor",
            "--data-dir",
            str(tmp_path),
            LUTHIER_DATABASE_URL=database_url,
            LUTHIER_REDIS_URL=redis_url,
        )
        for name in ("w1", "w2"):
            withdraw(client, kind="training", worker=name)
    assert done.returncode == 1, done.stdout
    assert "FAIL workers     1 training, and 1 that live but get no messages" in done.stdout


def test_doctor_says_what_to_do_and_fails_where_something_is_missing(tmp_path: Path) -> None:
    done = luthier("doctor", "--data-dir", str(tmp_path))
    assert done.returncode == 1
    assert "FAIL database    no URL -> set LUTHIER_DATABASE_URL, or start luthier up" in done.stdout


def test_doctor_notes_a_variable_that_nothing_reads(tmp_path: Path) -> None:
    done = luthier("doctor", "--data-dir", str(tmp_path), LUTHIER_PROT="1", LUTHIER_API_KEY="sk-12345678")
    told = [line for line in done.stdout.splitlines() if "variables" in line]
    assert told == [
        "note variables   LUTHIER_PROT is unknown and has no effect -> did you mean LUTHIER_PORT?"
    ]


def test_parts_are_not_given_the_operators_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_API_KEY", "sk-12345678")
    monkeypatch.setenv("LUTHIER_LOG_LEVEL", "DEBUG")
    environment = child_environment({"LUTHIER_PORT": "1"})
    assert "LUTHIER_API_KEY" not in environment
    assert (environment["LUTHIER_LOG_LEVEL"], environment["LUTHIER_PORT"]) == ("DEBUG", "1")


def test_help_needs_none_of_the_extras() -> None:
    script = (
        "import sys\n"
        "import app.cli.main\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'celery', 'openai', 'pydantic'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n"
    )
    script = (
        "import sys\n"
        "from app.cli import main, processes\n"
        "def missing(_): import torch\n"
        "processes.run_workers = missing\n"
        "sys.argv = ['luthier', 'worker', '--queues', 'training']\n"
        "main.run()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert_refused(
        done, "torch is not installed; run `make setup`, or `pip install '.[worker]'` in the clone."
    )


def test_ctrl_c_while_it_starts_ends_everything(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "app.cli.main", "up", "--port", "0", "--data-dir", str(tmp_path / "data")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Starting the database.\n"
        time.sleep(0.2)
        process.terminate()
        text = process.stdout.read()
        assert process.wait(timeout=20) == 0, text
    assert text.splitlines()[-1] == "Stopped."
    assert processes_of(tmp_path) == []
