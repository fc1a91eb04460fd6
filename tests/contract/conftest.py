"""The same server and tenants as the other tests of the API, and the official client before them."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.api.conftest import (
    Tenant,
    neighbour,
    server_url,
    settings,
    stand_in,
    storage,
    stranger,
    tenant,
    worker,
)

__all__ = ["neighbour", "server_url", "settings", "stand_in", "storage", "stranger", "tenant", "worker"]


@pytest.fixture
def client(tenant: Tenant, server_url: str) -> Iterator[openai.OpenAI]:
    """The client as a user makes it, but strict."""
    with openai.OpenAI(
        api_key=tenant.secret, base_url=f"{server_url}/v1", _strict_response_validation=True
    ) as client:
        yield client
