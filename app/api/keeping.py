"""Keeps whole answers for requests that say `store`, before the client is told that they are whole.

An answer that cannot be kept fails: a client that asked for it would look for it later. Knows no tables.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

from anyio import to_thread

from app.api.answers import Answer
from app.api.calls import Said
from app.api.outages import find_outage

Keep = Callable[[dict[str, Any]], None]


async def keep_whole(answer: dict[str, Any], keep: Keep) -> None:
    """Keep an answer. Raises what a client is told when that fails."""
    try:
        await to_thread.run_sync(keep, answer)
    except Exception as error:
        outage = find_outage(error)
        if outage is None:
            raise
        outage.message = f"The answer is whole, but it could not be stored. {outage.message}"
        raise outage from error


async def kept(words: AsyncIterator[list[Said]], answer: Answer, keep: Keep) -> AsyncIterator[list[Said]]:
    """The words as they come; their end comes once the whole answer is kept."""
    async for some in words:
        answer.take(some)
        yield some
    await keep_whole(answer.as_json(), keep)
