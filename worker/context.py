"""What every worker process holds: settings, database, storage, catalogue, broker. Knows no device."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import redis
from celery import Celery
from sqlalchemy.orm import Session, sessionmaker

from app.core.base_models import Catalogue, load_catalogue
from app.core.db import make_engine, make_sessions
from app.core.ids import random_name
from app.core.queue import Sender, make_celery
from app.core.redis_client import make_redis
from app.core.settings import Settings
from app.core.storage import Storage


@dataclass(frozen=True, slots=True)
class Context:
    """Made once at start-up and passed down."""

    settings: Settings
    sessions: sessionmaker[Session]
    storage: Storage
    catalogue: Catalogue
    celery: Celery
    sender: Sender
    redis: redis.Redis
    worker: str  # name of this process, unique among living ones


def make_context(settings: Settings) -> Context:
    """Connections are opened when first used, so a database that is late does no harm here."""
    celery = make_celery(settings)
    # A worker that is frozen while it writes to its job must let go of the row before its lease ends.
    idle_s = min(60.0, settings.lease_s / 2)
    return Context(
        settings=settings,
        sessions=make_sessions(make_engine(settings.database_url, idle_s=idle_s)),
        storage=Storage(settings.storage_dir),
        catalogue=load_catalogue(settings.models_file),
        celery=celery,
        sender=Sender(celery),
        redis=make_redis(settings.redis_url),
        # Random, because two machines may share a name, and a restarted container its process ids.
        worker=f"{socket.gethostname()}-{os.getpid()}-{random_name(6)}",
    )
