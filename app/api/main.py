"""Makes the application: routes, the key that every route needs, errors, the edge around it all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI

from app.api import docs, errors
from app.api.context import open_context
from app.api.dependencies import require_key
from app.api.descriptors import log_full_accepts_once
from app.api.middleware import Edge
from app.api.routes import (
    chat,
    completions,
    files,
    health,
    jobs,
    models,
    responses,
    stored_completions,
)
from app.core.settings import Settings


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings; connections open when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        log_full_accepts_once(asyncio.get_running_loop())
        async with open_context(settings) as context:
            app.state.context = context
            yield

    app = FastAPI(
        title="Luthier",
        description="Fine-tuning and chat behind OpenAI's API.",
        lifespan=lifespan,
        dependencies=[Depends(require_key)],
        docs_url=None,  # FastAPI's own page loads scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    for module in (files, jobs, models, chat, stored_completions, responses, completions, health, docs):
        app.include_router(module.router)
    app.openapi = partial(docs.describe, app)  # type: ignore[method-assign]
    errors.install(app)
    app.add_middleware(Edge, settings=settings)
    return app
