"""One frozen Settings object, read from LUTHIER_* variables once. Nothing else reads the environment."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

KILL_S = 1.0  # how long ending a whole process group takes at most


class Settings(BaseSettings):
    """What an operator may set. Every field says its meaning and unit."""

    model_config = SettingsConfigDict(env_prefix="LUTHIER_", frozen=True, extra="ignore")

    # Where things are
    database_url: str = ""  # postgresql+psycopg://…; empty: `luthier up` starts an embedded server
    redis_url: str = ""  # redis://…; empty: `luthier up` starts an embedded Valkey
    data_dir: Path = Path("data")  # models, logs, embedded servers, and storage unless set below
    storage_url: str = ""  # file:///…; empty: the folder `storage` in data_dir
    models_file: Path | None = None  # TOML catalogue merged over the built-in one
    host: str = "127.0.0.1"  # address the API listens on
    port: int = Field(default=8000, ge=0, le=65535)  # port the API listens on; 0: any free one

    # Limits of requests
    max_body_bytes: int = Field(default=8 * 2**20, gt=0)  # JSON bodies
    max_file_bytes: int = Field(default=512 * 2**20, gt=0)  # one uploaded file
    max_line_bytes: int = Field(default=4 * 2**20, gt=0)  # one line of a training file
    max_examples: int = Field(default=1_000_000, gt=0)  # lines of a training file
    max_messages: int = Field(default=2048, gt=0)  # messages of one chat request
    max_n: int = Field(default=16, gt=0)  # choices of one chat completion
    max_completion_tokens: int = Field(default=16_384, gt=0)  # tokens one choice may ask for
    max_project_storage_bytes: int = Field(default=2_500 * 10**9, gt=0)  # one project, seen before uploads

    # Life of a job
    min_examples: int = Field(default=10, ge=1)  # fewer fail the job, as at OpenAI
    lease_s: float = Field(default=30.0, gt=0)  # an attempt not renewed for so long is dead
    heartbeat_s: float = Field(default=5.0, gt=0)  # how often an attempt renews its lease
    sweep_s: float = Field(default=5.0, gt=0)  # how often housekeeping runs
    max_attempts: int = Field(default=3, ge=1)  # deaths before a job fails
    cancel_poll_s: float = Field(default=0.5, gt=0)  # how often a running attempt looks for a cancel
    trainer_start_s: float = Field(default=180.0, gt=0)  # a trainer not ready by then is ended
    setup_limit_s: float = Field(default=1800.0, gt=0)  # silence of a trainer that reads files and models
    step_limit_s: float = Field(default=600.0, gt=0)  # silence in a step; a sign of life each micro-batch
    validation_limit_s: float = Field(default=600.0, gt=0)  # silence in a validation
    checkpoint_limit_s: float = Field(default=600.0, gt=0)  # silence while a checkpoint is written
    trainer_grace_s: float = Field(default=10.0, gt=0)  # from asking a trainer to stop to ending it
    trainer_memory_bytes: int | None = Field(default=None, gt=0)  # of a trainer, where cgroups can be made
    checkpoint_every_s: float = Field(default=600.0, gt=0)  # a job never loses more work than this
    retry_pause_s: float = Field(default=5.0, ge=0)  # before a second try; doubled for each one after it
    idempotency_hours: float = Field(default=48.0, ge=24)  # how long an Idempotency-Key is remembered
    stored_days: float = Field(default=30.0, ge=1)  # how long stored completions and responses are kept
    max_stored_bytes: int = Field(
        default=10**9, gt=0
    )  # of each, of one project; beyond it the oldest go first
    kept_checkpoints: int = Field(default=3, ge=2)  # per job, as at OpenAI

    price_per_gpu_hour: float | None = Field(default=None, ge=0)  # of a worker, for estimates; any currency

    # Chat
    first_word_s: float = Field(default=60.0, gt=0)  # no word by then: 503
    word_gap_s: float = Field(default=120.0, gt=0)  # silence in the middle of an answer that ends it
    presence_s: float = Field(default=6.0, gt=0)  # a worker not heard of for so long counts as gone
    drain_s: float = Field(default=5.0, ge=0)  # how long answers may run on in a worker told to stop
    max_batch: int = Field(default=32, ge=1)  # sequences decoded together by one engine
    kv_cache_mb: int = Field(default=1024, ge=1)  # keys and values of a model's running rows; 10^6 bytes
    prefill_tokens: int = Field(default=256, ge=1)  # prompt tokens computed between two tokens of an answer
    prefix_cache_mb: int = Field(default=256, ge=0)  # known beginnings of prompts, per model; 10^6 bytes
    adapter_memory_mb: int = Field(default=2000, ge=1)  # adapters one engine keeps in memory, 10^6 bytes
    max_requests_in_flight: int = Field(default=64, ge=1)  # chat requests one inference worker holds
    max_waiting_requests: int = Field(default=256, ge=1)  # of one base model that no worker has taken yet
    inference_dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: what the device computes best
    inference_models: str = ""  # comma-separated base models a worker serves; empty: all of the catalogue

    # Names
    organization: str = "luthier"  # slug of the first organization; stands in model names
    project: str = "default"  # name of the first project
    log_level: str = "INFO"  # least severe lines that are logged

    @field_validator("storage_url")
    @classmethod
    def _only_files(cls, value: str) -> str:
        if value and not value.startswith("file:///"):
            raise ValueError("storage_url must be a file:/// URL with an absolute path")
        return value

    @model_validator(mode="after")
    def _lease_outlasts_a_kill(self) -> Settings:
        if self.lease_s <= KILL_S + 1.5 * self.heartbeat_s:
            raise ValueError(f"lease_s must exceed {KILL_S:g} + 1.5 x heartbeat_s")
        return self

    @property
    def storage_dir(self) -> Path:
        """Folder of the storage."""
        if self.storage_url:
            return Path(self.storage_url.removeprefix("file://"))
        return self.data_dir.absolute() / "storage"

    @property
    def models_dir(self) -> Path:
        """Folder of the base models' weights."""
        return self.data_dir.absolute() / "models"

    @property
    def served_base_models(self) -> tuple[str, ...]:
        """Names listed in `inference_models`; empty means the whole catalogue."""
        return tuple(name.strip() for name in self.inference_models.split(",") if name.strip())


@lru_cache(maxsize=1)
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings()
