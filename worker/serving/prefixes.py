"""Keys and values of prompts' beginnings, kept so that what many requests share is computed once.

Cut into blocks of 32 tokens, each named by a digest over its owner, all tokens before it and its own: so a
block is found only by requests of the same project on the same weights whose prompts are alike up to its end.
What no one used for longest leaves. Knows token ids and tensors, no rows and no requests.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict

from torch import Tensor

BLOCK = 32  # tokens


class PrefixCache:
    """Blocks within a budget in bytes; 0 keeps none."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()  # least recently used first
        self.size_bytes = 0

    def find(self, names: list[bytes]) -> list[Tensor]:
        """The blocks of the longest beginning that is known."""
        found: list[Tensor] = []
        for name in names:
            block = self._blocks.get(name)
            if block is None:
                break
            self._blocks.move_to_end(name)
            found.append(block)
        return found

    def clear(self) -> None:
        """Forget all."""
        self._blocks.clear()
        self.size_bytes = 0

    def __contains__(self, name: bytes) -> bool:
        return name in self._blocks

    def add(self, name: bytes, block: Tensor) -> None:
        """Keep a block that is not there yet."""
        self._blocks[name] = block
        self.size_bytes += _size_bytes(block)
        while self.size_bytes > self._budget_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.size_bytes -= _size_bytes(oldest)


def block_names(owner: tuple[str, str], ids: list[int]) -> list[bytes]:
    """Names of the whole blocks of `ids`. `owner`: project and weights."""
    names: list[bytes] = []
    name = hashlib.sha256(repr(owner).encode()).digest()
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        name = hashlib.sha256(name + array("q", ids[start : start + BLOCK]).tobytes()).digest()
        names.append(name)
    return names


def _size_bytes(block: Tensor) -> int:
    return block.numel() * block.element_size()
