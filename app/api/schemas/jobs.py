"""What a client asks of a fine-tuning job, ranges checked here; files and models are checked by core."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from app.api.faults import shown
from app.api.schemas.fields import Body, Metadata, Name, number_or_auto
from app.api.schemas.lists import MetadataQuery, PageQuery
from app.core.errors import InvalidRequest
from app.core.jobs import NewJob

MAX_LEARNING_RATE_MULTIPLIER = 1000.0  # beyond it every loss is NaN

Epochs = Annotated[Any, number_or_auto(int, low=1, high=50)]
BatchSize = Annotated[Any, number_or_auto(int, low=1, high=256)]
Multiplier = Annotated[Any, number_or_auto(float, low=0, high=MAX_LEARNING_RATE_MULTIPLIER, above=True)]


class Hyperparameters(Body):
    """Numbers of a run; "auto" leaves the choice to the service."""

    n_epochs: Epochs = "auto"
    batch_size: BatchSize = "auto"
    learning_rate_multiplier: Multiplier = "auto"


class Supervised(Body):
    """Options of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class Method(Body):
    """How to train. Preference and reinforcement methods are refused by name."""

    type: str
    supervised: Supervised | None = None
    dpo: Any = None
    reinforcement: Any = None


class LuthierOptions(Body):
    """Options beyond OpenAI's. What is absent is filled in from the base model's entry."""

    adapter: Literal["qlora", "lora", "full"] | None = None
    rank: int | None = Field(default=None, ge=1, le=256)
    alpha: float | None = Field(default=None, gt=0.0, le=65_536.0, allow_inf_nan=False)
    use_rslora: bool | None = None
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0, allow_inf_nan=False)
    target_modules: list[Annotated[Name, Field(pattern=r"^[A-Za-z0-9_.]{1,128}$")]] | None = Field(
        default=None, min_length=1, max_length=64
    )
    max_length: int | None = Field(default=None, ge=16, le=2**20)
    checkpoint_interval: int | None = Field(default=None, ge=1, le=2**31 - 1)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = Field(default=None, ge=0.0, le=1.0, allow_inf_nan=False)
    max_grad_norm: float | None = Field(default=None, gt=0.0, le=1_000_000.0, allow_inf_nan=False)
    early_stopping_patience: int | None = Field(default=None, ge=1, le=50)
    require_improvement: bool | None = None
    priority: int | None = Field(default=None, ge=-100, le=100)
    dry_run: bool | None = None  # of the request, not of the job

    def options(self) -> dict[str, Any]:
        """What of it belongs to the job."""
        return self.model_dump(exclude_none=True, exclude={"dry_run"})


class CreateJob(Body):
    """Body of POST /v1/fine_tuning/jobs."""

    model: Name
    training_file: Name
    validation_file: Name | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: str | None = Field(default=None, min_length=1, max_length=64)
    seed: int | None = Field(default=None, ge=0, le=2**31 - 1)
    integrations: list[Any] | None = Field(default=None, max_length=5)
    metadata: Metadata | None = None
    luthier: LuthierOptions | None = None

    @property
    def is_dry_run(self) -> bool:
        """Whether nothing is to be created."""
        return self.luthier is not None and bool(self.luthier.dry_run)

    def new_job(self) -> NewJob:
        """The job as core creates it."""
        self._refuse_other_methods()
        self._refuse_integrations()
        self._refuse_blind_stopping()
        return NewJob(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            method="supervised",
            hyperparameters=self._hyperparameters(),
            luthier={}
            if self.luthier is None
            else self.luthier.model_dump(exclude_none=True, exclude={"dry_run"}),
            suffix=self.suffix,
            seed=self.seed,
            metadata=self.metadata,
        )

    def _hyperparameters(self) -> dict[str, Any]:
        """Numbers from `method` or from the older place; both may be there when they agree."""
        supervised = self.method.supervised if self.method else None
        new = supervised.hyperparameters if supervised else None
        if new is not None and self.hyperparameters is not None and new != self.hyperparameters:
            raise InvalidRequest(
                "'hyperparameters' and 'method.supervised.hyperparameters' differ. "
                "Give only the latter; the former is deprecated.",
                code="invalid_value",
                param="hyperparameters",
            )
        chosen = new or self.hyperparameters or Hyperparameters()
        return chosen.model_dump()

    def _refuse_other_methods(self) -> None:
        method = self.method
        if method is None:
            return
        param = "method.type"
        if method.type == "supervised":
            if method.dpo is None and method.reinforcement is None:
                return
            param = "method.dpo" if method.dpo is not None else "method.reinforcement"
        raise InvalidRequest(
            f"Invalid value for '{param}': only supervised fine-tuning is supported here. "
            "Supported values of 'method.type' are: 'supervised'.",
            code="invalid_value",
            param=param,
        )

    def _refuse_blind_stopping(self) -> None:
        if self.validation_file is None and self.luthier and self.luthier.early_stopping_patience:
            raise InvalidRequest(
                "luthier.early_stopping_patience counts epochs without a better validation loss; give a "
                "validation_file, or leave it out.",
                code="invalid_value",
                param="luthier.early_stopping_patience",
            )

    def _refuse_integrations(self) -> None:
        if not self.integrations:
            return
        first = self.integrations[0]
        kind = first.get("type") if isinstance(first, dict) else None
        raise InvalidRequest(
            f"The integration {shown(kind)!r} is not supported here; leave 'integrations' out. "
            "Metrics stand in the job's events and in its results file.",
            code="invalid_value",
            param="integrations[0].type",
        )


class JobsQuery(MetadataQuery):
    """Jobs, newest first."""


class CheckpointsQuery(PageQuery):
    """Ten at a time, as at OpenAI."""

    limit: int = Field(default=10, ge=1, le=100)
