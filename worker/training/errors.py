"""How an attempt can end badly: errors that become a `Failed` word, each with a code and a cure.

Knows nothing of processes; whoever runs the loop decides what happens to unknown errors.
"""

from __future__ import annotations

import errno

import torch
from safetensors import SafetensorError

from app.core.failures import FAULTS, FailureCode, Fault
from worker.training.words import Failed

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DEVICE_FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")  # without a class of their own
_CURE = "Lower batch_size or luthier.max_length, choose the qlora adapter, or use a machine with more memory."


class TrainingError(Exception):
    """The attempt cannot go on. `message` is shown to the user as it is."""

    def __init__(self, code: FailureCode, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        retryable = FAULTS[code] in (Fault.MACHINE, Fault.HOST_MEMORY)
        self.word = Failed(code=code, message=message, param=param, retryable=retryable)


def failure_of(error: BaseException) -> Failed | None:
    """What the user is told about an error with a known cause; None for one that is ours."""
    if isinstance(error, TrainingError):
        return error.word
    if is_device_out_of_memory(error):
        return device_out_of_memory().word
    if is_host_out_of_memory(error):
        return host_out_of_memory().word
    return storage_full().word if is_storage_full(error) else None


def is_device_out_of_memory(error: BaseException) -> bool:
    """True for every way torch says that the device's memory ran out."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _DEVICE_FULL)


def is_host_out_of_memory(error: BaseException) -> bool:
    """True for every way Python and torch say that the machine's memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def is_storage_full(error: BaseException) -> bool:
    """True for every way Python and safetensors say that the disk or a quota is full."""
    if isinstance(error, SafetensorError):  # it hides the system's error in a text
        return any(f"(os error {number})" in str(error) for number in _FULL)
    return isinstance(error, OSError) and error.errno in _FULL


def device_out_of_memory() -> TrainingError:
    """What the user is told when the device has no room even for the smallest parts of a batch."""
    return TrainingError(
        FailureCode.OUT_OF_MEMORY,
        f"The device ran out of memory, even with each batch computed in small parts. {_CURE}",
    )


def host_out_of_memory() -> TrainingError:
    """What the user is told when the machine's own memory ran out."""
    return TrainingError(FailureCode.HOST_OUT_OF_MEMORY, f"The training machine ran out of memory. {_CURE}")


def storage_full() -> TrainingError:
    """What the user is told when a checkpoint found no room."""
    return TrainingError(
        FailureCode.STORAGE_FULL,
        "The training worker's storage is full. Delete models and files you no longer need, or ask the "
        "operator for room.",
    )


def server_error() -> TrainingError:
    """What the user is told about errors that are ours; the traceback stays in the worker's log."""
    return TrainingError(FailureCode.SERVER_ERROR, "The training worker had an unexpected error.")
