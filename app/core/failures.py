"""Every code a job can fail with: whose fault it is, and so whether another try makes sense. Closed.

docs/api.md lists the same codes for users; `fsck` and a test hold both against this.
"""

from __future__ import annotations

from enum import StrEnum


class Fault(StrEnum):
    """Who has to act before another try can end otherwise."""

    USER = "user"  # never retried
    MACHINE = "machine"  # retried by itself, until tries without progress run out
    DEVICE_MEMORY = "device_memory"  # micro-batches were shrunk already; never retried
    OPERATOR = "operator"  # this installation and this model do not go together; never retried
    HOST_MEMORY = "host_memory"  # one more try: a neighbour may have been the cause


class FailureCode(StrEnum):
    """OpenAI's codes where it has one, else our own."""

    INVALID_TRAINING_FILE = "invalid_training_file"
    INVALID_VALIDATION_FILE = "invalid_validation_file"
    INVALID_N_EXAMPLES = "invalid_n_examples"
    FILE_NOT_FOUND = "file_not_found"
    MODEL_NOT_AVAILABLE = "model_not_available"
    INVALID_MODEL = "invalid_model"
    INVALID_VALUE = "invalid_value"
    NO_TRAINABLE_TOKENS = "no_trainable_tokens"
    NON_FINITE_LOSS = "non_finite_loss"
    NON_FINITE_ADAPTER = "non_finite_adapter"  # or zero
    SERVING_MISMATCH = "serving_mismatch"  # the engine would answer otherwise than it was trained
    WRONG_PARAMETERS = "wrong_parameters"  # another number of them than rank and targets ask for
    NO_IMPROVEMENT = "no_improvement"  # on the validation file, over the model it began from
    OUT_OF_MEMORY = "out_of_memory"  # of the device
    HOST_OUT_OF_MEMORY = "host_out_of_memory"
    STORAGE_FULL = "storage_full"
    TRAINER_STALLED = "trainer_stalled"  # silent beyond its section's limit
    TRAINER_DIED = "trainer_died"  # exit code or signal
    WORKER_LOST = "worker_lost"  # the lease ran out
    SERVER_ERROR = "server_error"  # a bug of ours


_F = FailureCode
FAULTS: dict[FailureCode, Fault] = {
    **dict.fromkeys(
        (
            _F.INVALID_TRAINING_FILE,
            _F.INVALID_VALIDATION_FILE,
            _F.INVALID_N_EXAMPLES,
            _F.FILE_NOT_FOUND,
            _F.MODEL_NOT_AVAILABLE,
            _F.INVALID_MODEL,
            _F.INVALID_VALUE,
            _F.NO_TRAINABLE_TOKENS,
            _F.NON_FINITE_LOSS,
            _F.NON_FINITE_ADAPTER,
            _F.NO_IMPROVEMENT,
        ),
        Fault.USER,
    ),
    **dict.fromkeys((_F.SERVING_MISMATCH, _F.WRONG_PARAMETERS), Fault.OPERATOR),
    _F.OUT_OF_MEMORY: Fault.DEVICE_MEMORY,
    _F.HOST_OUT_OF_MEMORY: Fault.HOST_MEMORY,
    **dict.fromkeys(
        (_F.STORAGE_FULL, _F.TRAINER_STALLED, _F.TRAINER_DIED, _F.WORKER_LOST, _F.SERVER_ERROR),
        Fault.MACHINE,
    ),
}

CURES: dict[FailureCode, str] = {
    _F.HOST_OUT_OF_MEMORY: "Use shorter examples, a lower luthier.max_length or the qlora adapter, "
    "or ask the operator for a worker with more memory.",
    _F.STORAGE_FULL: "Delete models and files you no longer need, or ask the operator for room.",
    _F.TRAINER_STALLED: "Create the job again; if it stalls again, tell the operator.",
    _F.TRAINER_DIED: "Tell the operator: the worker's log says more.",
    _F.WORKER_LOST: "Tell the operator: workers that run this job vanish.",
    _F.SERVER_ERROR: "Tell the operator: the worker's log says why.",
}
"""What to do about failures that no message of the trainer explains."""


def is_retried(code: FailureCode) -> bool:
    """Whether another try by itself makes sense."""
    return FAULTS[code] in (Fault.MACHINE, Fault.HOST_MEMORY)


def most_deaths(code: FailureCode) -> int:
    """How many tries in a row may end by this before the job fails, whatever the settings allow."""
    return 2 if FAULTS[code] is Fault.HOST_MEMORY else 1000
