"""The same server and tenants as the other tests of the API."""

from tests.api.conftest import neighbour, server_url, settings, stand_in, storage, stranger, tenant, worker

__all__ = ["neighbour", "server_url", "settings", "stand_in", "storage", "stranger", "tenant", "worker"]
