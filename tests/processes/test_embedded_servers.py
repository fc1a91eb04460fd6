"""PostgreSQL and Valkey out of their wheels: whole, closed to others, and back after every kind of end."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from app.cli.errors import CommandError
from app.cli.postgres import explain_initdb, prepare_postgres, wait_for_postgres
from app.cli.valkey import prepare_valkey, wait_for_valkey
from tests.servers import PASSWORD, postgres_server, running, valkey_server

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    return psycopg.connect(url.replace("+psycopg", ""), autocommit=True)


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].split("/")[0])


def read_postmaster(cluster: Path) -> psutil.Process:
    return psutil.Process(int((cluster / "postmaster.pid").read_text().split()[0]))


def test_postgres_finds_its_rows_again(tmp_path: Path) -> None:
    with postgres_server(tmp_path / "data") as url, connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    with postgres_server(tmp_path / "data") as url, connect(url) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_postgres_comes_back_after_kill_9_of_all_its_processes(tmp_path: Path) -> None:
    cluster = tmp_path / "data"
    command = prepare_postgres(cluster, PASSWORD)  # durable: what was committed must be there
    with running(command, tmp_path / "log") as url:
        wait_for_postgres(url)
        with connect(url) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        postmaster = read_postmaster(cluster)
        processes = [postmaster, *postmaster.children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):  # the others end as soon as the first has
                process.kill()
        psutil.wait_procs(processes, timeout=10)
    assert (cluster / "postmaster.pid").exists()
    with running(prepare_postgres(cluster, PASSWORD), tmp_path / "log") as url:
        wait_for_postgres(url)
        with connect(url) as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


def test_a_stale_pid_file_that_names_another_process_does_not_block(tmp_path: Path) -> None:
    cluster = tmp_path / "data"
    with postgres_server(cluster):
        text = (cluster / "postmaster.pid").read_text()
    lines = [str(os.getpid()), *text.splitlines()[1:]]
    (cluster / "postmaster.pid").write_text("\n".join(lines) + "\n")
    with postgres_server(cluster) as url, connect(url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_a_server_left_by_a_dead_run_is_ended_first(tmp_path: Path) -> None:
    cluster = tmp_path / "data"
    command = prepare_postgres(cluster, PASSWORD, durable=False)
    with running(command, tmp_path / "log") as url:
        wait_for_postgres(url)
        left = read_postmaster(cluster)
        with postgres_server(cluster) as second, connect(second) as connection:
            assert not left.is_running() or left.status() == psutil.STATUS_ZOMBIE
            assert connection.execute("SELECT 1").fetchone() == (1,)


def test_postgres_runs_below_a_long_path_that_only_its_owner_may_enter(tmp_path: Path) -> None:
    folder = tmp_path / ("a long name " * 8) / ("and another one " * 6)
    folder.mkdir(parents=True)
    tmp_path.chmod(0o700)
    with postgres_server(folder / "data") as url, connect(url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_postgres_refuses_a_wrong_password(tmp_path: Path) -> None:
    with (
        postgres_server(tmp_path / "data") as url,
        pytest.raises(psycopg.OperationalError, match="password authentication failed"),
    ):
        connect(url.replace(PASSWORD, "wrong"))


@linux_only
def test_both_servers_listen_on_loopback_alone(tmp_path: Path) -> None:
    with postgres_server(tmp_path / "postgres") as database, valkey_server(tmp_path / "valkey") as broker:
        ports = {port_of(database), port_of(broker)}
        listening = {
            connection.laddr.ip
            for connection in psutil.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports
        }
    assert listening == {"127.0.0.1"}


def test_a_cluster_half_made_by_a_killed_run_is_made_anew(tmp_path: Path) -> None:
    partial = tmp_path / ".data.partial"
    partial.mkdir()
    (partial / "PG_VERSION").write_text("18\n")
    with postgres_server(tmp_path / "data") as url, connect(url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert not partial.exists()


def test_the_password_of_the_cluster_is_on_no_command_line(tmp_path: Path) -> None:
    argv = prepare_postgres(tmp_path / "postgres", PASSWORD, durable=False).argv
    argv += prepare_valkey(tmp_path / "valkey", PASSWORD).argv
    assert not any(PASSWORD in word for word in argv)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("initdb: error: could not write: No space left on device", "is full; free"),
        ("initdb: error: could not access directory: Permission denied", "nobody may not enter .*--data-dir"),
        ("initdb: error: something else", "could not make its files in .*: initdb: error: something else"),
    ],
)
def test_why_a_cluster_could_not_be_made_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match=sentence):
        raise CommandError(explain_initdb(text, tmp_path / "data", "nobody"))


def test_valkey_asks_for_its_password_and_keeps_nothing_on_disk(tmp_path: Path) -> None:
    folder = tmp_path / "valkey"
    with valkey_server(folder) as url:
        with redis.Redis.from_url(url) as client:
            client.set("key", "value")
        with redis.Redis(port=port_of(url)) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.get("key")
    assert [path.name for path in folder.iterdir()] == ["valkey.conf"]
    assert stat.S_IMODE((folder / "valkey.conf").stat().st_mode) == 0o600


def test_valkey_ends_with_the_process_that_holds_it(tmp_path: Path) -> None:
    command = prepare_valkey(tmp_path / "valkey", PASSWORD)
    with subprocess.Popen(command.argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as leash:
        wait_for_valkey(command.url)
        leash.send_signal(signal.SIGTERM)
        assert leash.wait(timeout=10) == 0
    with pytest.raises(TimeoutError, match="did not answer within 0 s"):
        wait_for_valkey(command.url, timeout_s=0.1)


def others_may_enter(folder: Path) -> bool:
    return all(parent.stat().st_mode & stat.S_IXOTH for parent in (folder, *folder.parents))


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root to become somebody else; else all tests here show it"
)
@pytest.mark.skipif(not others_may_enter(Path(sys.base_prefix)), reason="this Python is for root alone")
def test_an_ordinary_user_runs_both() -> None:
    script = (
        "import sys, os; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from pathlib import Path\n"
        "from tests.servers import postgres_server, valkey_server\n"
        "with postgres_server(Path(sys.argv[1], 'postgres')), valkey_server(Path(sys.argv[1], 'valkey')):\n"
        "    print('both')\n"
    )
    folder = Path("/tmp") / f"luthier-test-{os.getpid()}-{time.monotonic_ns()}"  # pytest's is root's alone
    folder.mkdir()
    try:
        os.chown(folder, 65534, 65534)
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            timeout=60,
        )
        assert done.stdout == "both\n", done.stderr
    finally:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
