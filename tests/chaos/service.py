"""A private service: servers, proxies, API and workers as separate processes, with short leases.

Every process of the product speaks to database and broker through a proxy of its own. The harness itself
looks at the database directly.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import redis
from sqlalchemy import make_url

from app.cli.embedded import find_free_port
from app.cli.postgres import end_leftovers, prepare_postgres, wait_for_postgres
from app.cli.process_commands import SOURCE_ROOT, luthier
from app.cli.valkey import prepare_valkey, wait_for_valkey
from app.core import keys
from app.core.db import make_engine, make_sessions, transaction
from app.core.migrate import upgrade
from tests.chaos.parts import Part, Server
from tests.chaos.proxy import Proxy
from tests.tiny import build_tiny_model

PASSWORD = "only-for-tests"
LEASE_S = 3.0
HEARTBEAT_S = 0.5
TRAINING = ("training-a", "training-b")
COMMANDS = {
    "api": ("api",),
    "control": ("worker", "--queues", "control"),
    **dict.fromkeys(TRAINING, ("worker", "--queues", "training")),
    "inference": ("worker", "--queues", "inference"),
}
START_S = 180.0
VOLUME_BYTES = 400 * 2**20
HOOKS = Path(__file__).with_name("hooks")
SETTINGS = {
    "lease_s": LEASE_S,
    "heartbeat_s": HEARTBEAT_S,
    "sweep_s": 0.5,
    "cancel_poll_s": 0.1,
    "retry_pause_s": 0.2,
    "presence_s": 3.0,
    "trainer_grace_s": 4.0,
    "step_limit_s": 8.0,
    "first_word_s": 20.0,
    "inference_dtype": "float32",
    "inference_models": "tiny",
    "adapter_memory_mb": 4,  # caches that are soon full, so that their filling looks like no leak
    "prefix_cache_mb": 4,
    "log_level": "INFO",
}


class Service:
    """Everything, below one folder. Start it once; faults break and mend parts of it."""

    def __init__(self, folder: Path, *, storage: Path | None = None) -> None:
        self.folder = folder
        for name in ("logs", "chaos", "data"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.chaos = folder / "chaos"
        self.storage = storage or folder / "data" / "storage"
        self.postgres = Server(
            "postgres", prepare_postgres(folder / "postgres", PASSWORD), folder / "logs" / "postgres.log"
        )
        self.valkey = Server(
            "valkey", prepare_valkey(folder / "valkey", PASSWORD), folder / "logs" / "valkey.log"
        )
        self.has_volume = False  # whether the storage is a small volume of its own, which may be filled
        self.database = {name: Proxy(self.postgres.port) for name in COMMANDS}
        self.broker = {name: Proxy(self.valkey.port) for name in COMMANDS}
        self.port = find_free_port()
        self.base_url = f"http://127.0.0.1:{self.port}"
        self.parts = {name: self._part(name, words) for name, words in COMMANDS.items()}
        self.engine = make_engine(self.postgres.url)
        self.redis = redis.Redis.from_url(self.valkey.url, socket_timeout=5)

    def start(self) -> None:
        """Servers, schema, then everything else; returns once all is ready."""
        if not (self.folder / "models.toml").exists():
            write_catalogue(self.folder)
        self.has_volume = self.has_volume or mount_volume(self.storage)
        self.start_servers()
        upgrade(self.postgres.url)
        for part in self.parts.values():
            part.start()
        self.wait_ready()

    def start_servers(self) -> None:
        """Start what is down of database and broker."""
        if not self.postgres.is_alive:
            end_leftovers(self.folder / "postgres")
            self.postgres.start()
        self.valkey.start()
        wait_for_postgres(self.postgres.url)
        wait_for_valkey(self.valkey.url)

    def heal(self) -> None:
        """Undo every fault: lines, servers, processes, orders."""
        self.order()
        for proxy in (*self.database.values(), *self.broker.values()):
            proxy.heal()
        self.start_servers()
        with suppress(redis.RedisError):
            self.redis.config_set("maxmemory", 0)
            self.redis.replicaof("NO", "ONE")
        for part in self.parts.values():
            if part.wrapper or part.extra_env:
                part.wrapper, part.extra_env = [], {}
                part.stop()
            part.start()

    def wait_ready(self, *, timeout_s: float = START_S) -> None:
        """Until /readyz agrees and every training worker has a warm trainer."""
        deadline = time.monotonic() + timeout_s
        reason = ""
        while time.monotonic() < deadline:
            reason = self.why_not_ready()
            if not reason:
                return
            for part in self.parts.values():
                part.start()  # what ended is started again, as a supervisor does
            time.sleep(0.2)
        raise TimeoutError(f"the service is not ready: {reason}")

    def why_not_ready(self) -> str:
        """Empty when all is there."""
        dead = [part.name for part in self.parts.values() if not part.is_alive]
        if dead:
            return f"{', '.join(dead)} ended"
        try:
            answer = httpx.get(f"{self.base_url}/readyz", timeout=5)
            missing = self.absent_trainers()
        except (httpx.HTTPError, redis.RedisError) as error:
            return repr(error)
        return answer.text if answer.status_code != 200 else ", ".join(missing)

    def absent_trainers(self) -> list[str]:
        """Training workers that do not say yet that their trainer is warm."""
        keys = self.redis.scan_iter("luthier:worker:*")
        present = {bytes(key).rsplit(b":", 1)[1].decode() for key in keys}
        return [name for name in TRAINING if not any(self.is_named(name, worker) for worker in present)]

    def is_named(self, name: str, worker: str) -> bool:
        """Whether a worker's own name, host-pid-word, is that of this part."""
        return f"-{self.pid_of(name)}-" in f"{worker}-"

    def pid_of(self, name: str) -> int:
        """Of the product's process, behind whatever stands before it."""
        part = self.parts[name]
        if not part.wrapper:
            return part.pid
        words = COMMANDS[name]
        for child in part.children():
            with suppress(Exception):
                if tuple(child.cmdline()[-len(words) :]) == words:
                    return child.pid
        return part.pid

    def trainers(self) -> list[psutil.Process]:
        """The processes that train, of the training workers."""
        found = [self.parts[name].trainer() for name in TRAINING]
        return [trainer for trainer in found if trainer is not None]

    def order(self, *orders: dict[str, object]) -> None:
        """What trainers are to do at their steps from now on; none: behave."""
        partial = self.chaos / "orders.partial"
        partial.write_text(json.dumps(orders))
        partial.rename(self.chaos / "orders.json")

    def key(self, project: str) -> str:
        """A new key of a project, made when new."""
        with transaction(make_sessions(self.engine)) as session:
            owner = keys.ensure_project(session, project=project, organization="luthier")
            return keys.create_key(session, project=owner, name="chaos")[1]

    def stop(self) -> None:
        """End everything."""
        for part in self.parts.values():
            if part.is_alive:
                part.thaw()
                part.kill(signal.SIGTERM)
        for part in self.parts.values():
            part.stop(timeout_s=15)
        for proxy in (*self.database.values(), *self.broker.values()):
            proxy.close()
        self.engine.dispose()
        self.redis.close()
        self.valkey.stop()
        self.postgres.stop()
        if self.has_volume:
            subprocess.run(["umount", "-l", str(self.storage)], check=False)

    def environment(self, name: str) -> dict[str, str]:
        """Of one process of the product: its own lines to the servers, and the hooks of a trainer."""
        database = make_url(self.postgres.url).set(port=self.database[name].port)
        broker = make_url(self.valkey.url).set(port=self.broker[name].port)
        settings = SETTINGS | {
            "database_url": database.render_as_string(hide_password=False),
            "redis_url": broker.render_as_string(hide_password=False),
            "data_dir": self.folder / "data",
            "storage_url": f"file://{self.storage}",
            "models_file": self.folder / "models.toml",
            "port": self.port,
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LUTHIER_", "PYTHON"))}
        return kept | {
            **{f"LUTHIER_{key.upper()}": str(value) for key, value in settings.items()},
            "PYTHONPATH": os.pathsep.join([str(HOOKS), str(SOURCE_ROOT)]),
            "PYTHONUNBUFFERED": "1",
            "CHAOS_FOLDER": str(self.chaos),
            "OMP_NUM_THREADS": "1",
        }

    def _part(self, name: str, words: tuple[str, ...]) -> Part:
        return Part(name, luthier(*words), self.folder / "logs" / f"{name}.log", self.environment(name))


def write_catalogue(folder: Path) -> None:
    """A catalogue with one tiny model, built on the spot."""
    model = build_tiny_model(folder / "tiny")
    lines = ["[models.tiny]", f'source = "file://{model}"', 'licence = "MIT"']
    lines += ["context_length = 512", "learning_rate = 1e-3", 'adapter = "lora"', ""]
    (folder / "models.toml").write_text("\n".join(lines))


def run_luthier(service: Service, *words: str, timeout_s: float = 120.0) -> tuple[int, str]:
    """A command of the product against this service; its exit code and what it said."""
    done = subprocess.run(
        luthier(*words),
        env=service.environment("api"),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd="/",
    )
    return done.returncode, (done.stdout + done.stderr).strip()


def mount_volume(folder: Path) -> bool:
    """A small tmpfs for the storage; False where that is not allowed, and the folder stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0 or sys.platform != "linux":
        return False
    options = f"size={VOLUME_BYTES},mode=755"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "chaos", str(folder)], capture_output=True, check=False
    )
    return done.returncode == 0
