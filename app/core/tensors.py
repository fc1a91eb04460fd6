"""The header of a safetensors file, read without torch: which tensors it has, and whether they are all there.

Format: github.com/huggingface/safetensors, "Format": 8 bytes of length, a JSON header, the bytes.
"""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from app.core.manifest import DamagedError

_MAX_HEADER_BYTES = 100 * 10**6  # as safetensors itself
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def check_header(path: Path) -> None:
    """Raises DamagedError unless the tensors fill the file exactly, each as long as its shape says."""
    try:
        header, size_bytes = read_header(path)
        spans = sorted(_span(tensor) for name, tensor in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise DamagedError(f"{path.name} has no readable header") from None
    end = 0
    for begin, after in spans:
        if begin != end:
            raise DamagedError(f"{path.name} has tensors that overlap or leave a gap")
        end = after
    if not spans or end != size_bytes:
        raise DamagedError(f"{path.name} is not as long as its tensors")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes follow it. Raises OSError, or ValueError where it is none."""
    size_bytes = path.stat().st_size
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("no file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size_bytes - 8):
            raise ValueError("longer than the file")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, size_bytes - 8 - length


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    begin, end = tensor["data_offsets"]
    shape = tensor["shape"]
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a number")
    if (end - begin) * 8 != math.prod(shape) * _BITS[tensor["dtype"]]:
        raise ValueError("a tensor")
    return begin, end
