"""The reader of replies at its end."""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio
from redis.exceptions import ConnectionError as LostError

from app.api.replies import ReplyReader


class Deaf(redis.asyncio.Redis):
    """A client that takes one cancel for a connection that broke, as the driver may while it reconnects."""

    broke = False

    async def xread(self, *_: Any, **__: Any) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if self.broke:
                raise
            self.broke = True
            raise LostError from None

    async def delete(self, *_: Any) -> Any:
        return 0


async def come_and_go() -> None:
    """A process that starts and ends."""
    async with ReplyReader(Deaf(), "stream").running():
        await asyncio.sleep(0)


def test_a_cancel_that_the_client_swallows_ends_the_reader_all_the_same() -> None:
    asyncio.run(asyncio.wait_for(come_and_go(), timeout=2))
