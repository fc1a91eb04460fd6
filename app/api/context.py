"""What one API process holds from start to end: connections, storage, catalogue, reader of replies."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import redis
from anyio import CapacityLimiter
from sqlalchemy import Engine
from sqlalchemy.orm import Session, sessionmaker

from app.api.engines import Engines
from app.api.presences import TrainingWorkers
from app.api.replies import ReplyReader
from app.core.base_models import Catalogue, load_catalogue
from app.core.db import make_engine, make_sessions
from app.core.ids import random_name
from app.core.queue import Sender, make_celery
from app.core.redis_client import make_async_redis, make_redis
from app.core.settings import Settings
from app.core.storage import Storage
from app.core.token_stream import reply_stream

PATIENCE_S = 1.5  # for a lock, a connection, a word of the broker: whoever asks can come back
STATEMENT_S = 8.0  # none takes long, unless the database is ill
LAST_HINTS_S = 1.0  # how long hints may take to leave a process that ends
HEALTH_THREADS = 12  # of their own: a hanging check must not take the threads of requests


@dataclass(frozen=True, slots=True)
class Context:
    """Everything routes reach beyond their request."""

    settings: Settings
    engine: Engine
    sessions: sessionmaker[Session]
    storage: Storage
    catalogue: Catalogue
    sender: Sender
    redis: redis.Redis
    replies: ReplyReader
    engines: Engines
    training_workers: TrainingWorkers
    health_threads: CapacityLimiter


@asynccontextmanager
async def open_context(settings: Settings) -> AsyncIterator[Context]:
    """Open all of it; neither database nor broker has to be there yet."""
    engine = make_engine(settings.database_url, patience_s=PATIENCE_S, statement_s=STATEMENT_S)
    celery = make_celery(settings)
    client = make_redis(settings.redis_url, patience_s=PATIENCE_S)
    replies = ReplyReader(make_async_redis(settings.redis_url), reply_stream(random_name(12)))
    try:
        sender = Sender(celery)
        async with replies.running():
            yield Context(
                settings=settings,
                engine=engine,
                sessions=make_sessions(engine),
                storage=Storage(settings.storage_dir),
                catalogue=load_catalogue(settings.models_file),
                sender=sender,
                redis=client,
                replies=replies,
                engines=Engines(client),
                training_workers=TrainingWorkers(client),
                health_threads=CapacityLimiter(HEALTH_THREADS),
            )
        sender.flush(timeout_s=LAST_HINTS_S)
    finally:
        client.close()
        celery.close()
        engine.dispose()
