"""The whole matrix: importing this enters every fault into `ALL`."""

from __future__ import annotations

from tests.chaos import broker, clients, database, processes, saves, storage, training
from tests.chaos.faults import ALL

GROUPS = (processes, training, saves, broker, database, storage, clients)

__all__ = ["ALL", "GROUPS"]
