"""What routes ask for: the context, the caller, a session that commits before the reply leaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Request
from sqlalchemy.orm import Session

from app.api.context import Context
from app.core.db import transaction
from app.core.errors import InvalidKey
from app.core.keys import Caller, authenticate

# The only paths that answer without a key; everything else is closed, also what is added later.
OPEN_PATHS = frozenset({"/healthz", "/readyz", "/docs", "/openapi.json"})


# What only looks something up is `async`: FastAPI would send a plain function to a thread, and when all
# threads wait for a database that hangs, not even /healthz would answer.
async def get_context(request: Request) -> Context:
    """The context of this process."""
    context = request.app.state.context
    assert isinstance(context, Context)
    return context


ContextDep = Annotated[Context, Depends(get_context)]


async def require_key(request: Request, context: ContextDep) -> None:
    """Refuse whoever brings no valid key. Uses a session of its own, closed before the work starts."""
    if request.scope["route"].path in OPEN_PATHS:
        return
    scheme, _, secret = request.headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise InvalidKey(
            "You didn't provide an API key. Send it in the header 'Authorization: Bearer YOUR_KEY'."
        )
    request.state.caller = await to_thread.run_sync(_authenticate, context, secret.strip())


def _authenticate(context: Context, secret: str) -> Caller:
    with context.sessions() as session:
        return authenticate(session, secret)


async def get_caller(request: Request) -> Caller:
    """Whose request this is, as `require_key` found."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]


def get_session(context: ContextDep) -> Iterator[Session]:
    """One transaction for the request."""
    with transaction(context.sessions) as session:
        yield session


# scope="function": the commit comes before the reply, so nobody is told of a row that is not there.
SessionDep = Annotated[Session, Depends(get_session, scope="function")]
