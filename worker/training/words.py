"""Every word the training worker and its child process say to each other, as JSON lines.

One `TrainSpec` goes in; what happened comes out, ended by `Finished` or `Failed`.
Knows neither torch nor the database.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from app.core.failures import FailureCode


class Wire(BaseModel):
    """Plain data that crosses a process border."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Adapter(StrEnum):
    """What is trained: factors over a 4-bit base, factors over a full-precision base, or all weights."""

    QLORA = "qlora"
    LORA = "lora"
    FULL = "full"


class Schedule(StrEnum):
    """What the learning rate does after its warm-up."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class TrainSpec(Wire):
    """One attempt at one job. Paths are folders and files on this machine; numbers are resolved."""

    job_id: str
    attempt: int
    base_model_dir: str
    chat_template: str | None = None  # the catalogue's template, where it replaces the model's own
    start_from_dir: str | None = None  # a tuned model's folder to go on from
    training_file: str
    validation_file: str | None = None
    max_line_bytes: int = 4 * 2**20  # the longest line of these files, as it was validated
    output_dir: str  # the attempt's own folder; nothing is written outside it
    adapter: Adapter = Adapter.QLORA
    rank: int = 16
    alpha: float = 32.0
    use_rslora: bool = False  # scale factors by alpha / sqrt(rank), not alpha / rank
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()  # empty: all linear layers of the blocks
    n_epochs: int = 3
    batch_size: int = 4
    learning_rate: float = 2e-4  # at its peak
    lr_scheduler_type: Schedule = Schedule.LINEAR
    warmup_ratio: float = 0.05  # of all steps
    max_grad_norm: float = 1.0  # longer gradients are shortened to this norm
    early_stopping_patience: int | None = None  # epochs without a better full validation loss
    seed: int = 0
    max_length: int = 2048  # tokens; longer examples are cut at the end
    checkpoint_interval: int | None = None  # steps; None: at the end of each epoch only
    checkpoint_every_s: float | None = None  # and whenever so long has passed since the last one
    require_improvement: bool = True  # fail unless the loss on the validation file fell
    resume_from: tuple[str, ...] = ()  # checkpoint folders to go on from, the newest first


class Metrics(Wire):
    """What OpenAI calls metrics. Losses are mean nats per trained token, accuracies lie in 0..1."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class Ready(Wire):
    """The child process has its imports behind it and waits for a `TrainSpec`. Said once."""

    word: Literal["ready"] = "ready"
    device: str  # cpu or cuda
    number_bytes: int = 4  # of one number in products
    memory_bytes: int | None = None  # of the device; on a CPU what this process may have; None: unknown


class Section(StrEnum):
    """What a trainer is busy with. Each has its own limit of silence."""

    SETUP = "setup"  # from the spec to `Started`: files, base model, adapter, resume
    STEP = "step"
    VALIDATION = "validation"
    CHECKPOINT = "checkpoint"


class Working(Wire):
    """A section begins, or goes on: said at each beginning and every few seconds while something moves."""

    word: Literal["working"] = "working"
    section: Section
    step: int = 0  # the step it belongs to


class Started(Wire):
    """Data and model are ready. `step` steps are behind; more than 0 after a resume."""

    word: Literal["started"] = "started"
    step: int = 0


class Baseline(Wire):
    """What the model to start from makes of the validation file, before the first step. Said once a run."""

    word: Literal["baseline"] = "baseline"
    metrics: Metrics  # of step 0


class StepDone(Wire):
    """One optimizer step is done."""

    word: Literal["step"] = "step"
    metrics: Metrics
    total_steps: int
    epoch: int  # 1-based
    learning_rate: float
    tokens: int  # tokens of this step's batch
    elapsed_s: float  # of training up to now, in all attempts that led here
    tokens_per_second: float  # mean over that time


class CheckpointReady(Wire):
    """A checkpoint folder is whole on disk. `dir` lies below `output_dir`."""

    word: Literal["checkpoint"] = "checkpoint"
    metrics: Metrics
    dir: str


class Log(Wire):
    """Something the user should know; becomes an event of the job."""

    word: Literal["log"] = "log"
    level: Literal["info", "warn", "error"] = "info"
    message: str


class Stopped(Wire):
    """Asked by SIGTERM, the trainer has ended early. Its last `CheckpointReady` is where to go on from.

    `step` is that checkpoint's step, 0 where nothing was trained yet. The child is free for the next spec.
    """

    word: Literal["stopped"] = "stopped"
    step: int


class Failed(Wire):
    """The attempt ended by an error. `retryable` is true where the machine, not the user, is at fault."""

    word: Literal["failed"] = "failed"
    code: FailureCode
    message: str
    param: str | None = None
    retryable: bool = False


class Finished(Wire):
    """The attempt is complete."""

    word: Literal["finished"] = "finished"
    trained_tokens: int
    steps: int  # that were trained
    step: int  # of the checkpoint that is the tuned model
    full_valid_loss: float | None = None  # of the tuned model


TrainWord = Annotated[
    Ready | Started | Working | Baseline | StepDone | CheckpointReady | Log | Stopped | Failed | Finished,
    Field(discriminator="word"),
]
TRAIN_WORD: TypeAdapter[TrainWord] = TypeAdapter(TrainWord)
