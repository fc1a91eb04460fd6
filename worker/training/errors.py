"""How an attempt can end badly: errors that become a `Failed` word, each with a code and a cure.

Knows nothing of processes; whoever runs the loop decides what happens to unknown errors.
"""

from __future__ import annotations

import errno

import torch
from safetensors import SafetensorError

from worker.training.words import Failed

_FULL = (errno.ENOSPC, errno.EDQUOT)


class TrainingError(Exception):
    """The attempt cannot go on. `message` is shown to the user as it is."""

    def __init__(self, code: str, message: str, *, param: str | None = None, retryable: bool = False) -> None:
        super().__init__(message)
        self.word = Failed(code=code, message=message, param=param, retryable=retryable)


def failure_of(error: BaseException) -> Failed | None:
    """What the user is told about an error with a known cause; None for one that is ours."""
    if isinstance(error, TrainingError):
        return error.word
    if is_out_of_memory(error):
        return out_of_memory()
    return storage_full() if is_storage_full(error) else None


def is_out_of_memory(error: BaseException) -> bool:
    """True for every way Python and torch say that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def is_storage_full(error: BaseException) -> bool:
    """True for every way Python and safetensors say that the disk or a quota is full."""
    if isinstance(error, SafetensorError):  # it hides the system's error in a text
        return any(f"(os error {number})" in str(error) for number in _FULL)
    return isinstance(error, OSError) and error.errno in _FULL


def out_of_memory() -> Failed:
    """What the user is told when memory ran out."""
    return Failed(
        code="out_of_memory",
        message=(
            "The training worker ran out of memory. Lower batch_size or luthier.max_length, choose the "
            "qlora adapter, or use a machine with more memory."
        ),
    )


def storage_full() -> Failed:
    """What the user is told when a checkpoint found no room."""
    return Failed(
        code="storage_full",
        message=(
            "The training worker's storage is full. Delete models and files you no longer need, or ask the "
            "operator for room."
        ),
        retryable=True,
    )


def server_error() -> Failed:
    """What the user is told about errors that are ours; the traceback stays in the worker's log."""
    return Failed(code="server_error", message="The training worker had an unexpected error.", retryable=True)
