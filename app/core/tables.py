"""The mapped classes. Ids a client sees are primary keys; every row of a user belongs to a project."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Identity, Index, String, text
from sqlalchemy.dialects.postgresql import JSON, JSONB
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from app.core.completions import WeightsKind
from app.core.db import Base, Text, UtcDateTime, utc_now
from app.core.status import JobStatus
from app.core.vocabulary import EventLevel, EventType, FileStatus, Purpose

Json = dict[str, Any]


class Organization(Base):
    """Owner of projects; its slug stands in model names."""

    __tablename__ = "organizations"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    slug: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class Project(Base):
    """The border nothing crosses: files, jobs and models belong to exactly one."""

    __tablename__ = "projects"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class ApiKey(Base):
    """A key as its SHA-256; the secret itself is shown once and kept nowhere."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    name: Mapped[str] = mapped_column(String(64))
    hint: Mapped[str] = mapped_column(String(16))  # first characters, to tell keys apart
    digest: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    revoked_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class File(Base):
    """A file whose bytes are whole in storage. Deleting marks the row; the bytes go later."""

    __tablename__ = "files"
    __table_args__ = (Index(None, "project_id", "created_at", "id"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    filename: Mapped[str]
    purpose: Mapped[Purpose] = mapped_column(Text(Purpose))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    status: Mapped[FileStatus] = mapped_column(Text(FileStatus))
    storage_key: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    purged_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # bytes are gone


class Job(Base):
    """A fine-tuning job. Workers change it through attempts.py, users through jobs.py."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index(None, "project_id", "created_at", "id"),
        Index("ix_jobs_open", "status", postgresql_where=text("finished_at IS NULL")),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    organization_id: Mapped[str] = mapped_column(ForeignKey("organizations.id"))
    status: Mapped[JobStatus] = mapped_column(Text(JobStatus))
    model: Mapped[str]  # as asked: a base model or a tuned one
    base_model: Mapped[str]  # catalogue name below it
    training_file: Mapped[str]
    validation_file: Mapped[str | None]
    method: Mapped[str] = mapped_column(String(32))
    hyperparameters: Mapped[Json] = mapped_column(JSONB)  # "auto" until the files are read
    luthier: Mapped[Json] = mapped_column(JSONB)  # own extensions, defaults filled in
    suffix: Mapped[str | None]
    seed: Mapped[int]
    user_metadata: Mapped[Json | None] = mapped_column("metadata", JSONB(none_as_null=True))
    priority: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    started_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    estimated_finish: Mapped[datetime | None] = mapped_column(UtcDateTime)
    error: Mapped[Json | None] = mapped_column(JSONB(none_as_null=True))
    trained_tokens: Mapped[int | None] = mapped_column(BigInteger)
    result_file: Mapped[str | None]
    fine_tuned_model: Mapped[str | None]
    attempt: Mapped[int] = mapped_column(default=0)
    deaths: Mapped[int] = mapped_column(default=0)  # attempts that ended by the machine's fault
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    claimed_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # by the present attempt
    running_s: Mapped[float] = mapped_column(
        default=0.0, server_default="0"
    )  # seconds that ended attempts held a worker
    not_before: Mapped[datetime | None] = mapped_column(UtcDateTime)  # pause between two tries
    pause_requested_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # ends in `paused`, not `queued`
    hinted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)  # last message sent about it


class JobEvent(Base):
    """Something that happened to a job. Metrics are keyed by step, so a repeated step adds nothing."""

    __tablename__ = "job_events"
    __table_args__ = (
        Index(None, "job_id", "sequence"),
        Index(
            "uq_job_events_step",
            "job_id",
            "step",
            unique=True,
            postgresql_where=text("type = 'metrics'"),
        ),
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(BigInteger, Identity())
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    attempt: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    level: Mapped[EventLevel] = mapped_column(Text(EventLevel))
    type: Mapped[EventType] = mapped_column(Text(EventType))
    message: Mapped[str]
    step: Mapped[int | None]
    data: Mapped[Json] = mapped_column(JSONB, default=dict)


class Checkpoint(Base):
    """A saved state of a job; its model answers in chat."""

    __tablename__ = "checkpoints"
    __table_args__ = (Index(None, "job_id", "step_number", unique=True),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    model_id: Mapped[str] = mapped_column(ForeignKey("tuned_models.id"))
    step_number: Mapped[int]
    metrics: Mapped[Json] = mapped_column(JSONB)
    resumable: Mapped[bool] = mapped_column(
        default=False, server_default="false"
    )  # its folder still holds the training state
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class TunedModel(Base):
    """A name that answers in chat: the model of a job, or one of its checkpoints."""

    __tablename__ = "tuned_models"
    __table_args__ = (Index(None, "project_id", "created_at", "id"), Index(None, "storage_key"))

    id: Mapped[str] = mapped_column(String(256), primary_key=True)  # ft:base:org:suffix:uid[:ckpt-step-N]
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"))
    base_model: Mapped[str]
    kind: Mapped[WeightsKind] = mapped_column(Text(WeightsKind))
    storage_key: Mapped[str]  # two names may share the same weights
    is_checkpoint: Mapped[bool]
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    purged_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class IdempotencyKey(Base):
    """The answer to a request that created something, kept to be given again to the same request."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (Index(None, "created_at"),)

    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64))  # SHA-256 of method, path and body
    response: Mapped[Json] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)


class Stored:
    """Columns of an answer that is kept because its request said `store`. As JSON, not JSONB: keys stay in
    their order, and nothing looks inside."""

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    project_id: Mapped[str] = mapped_column(ForeignKey("projects.id"))
    model: Mapped[str]
    response: Mapped[Json] = mapped_column(JSON)  # as it was sent
    size_bytes: Mapped[int] = mapped_column(BigInteger)  # of all its JSON
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, default=utc_now)

    @declared_attr.directive
    @classmethod
    def __table_args__(cls) -> tuple[Index, ...]:
        # Its size lies in the index, so that adding up what a project stores reads no row.
        return (Index(None, "project_id", "created_at", "id", postgresql_include=["size_bytes"]),)


class StoredCompletion(Stored, Base):
    """A chat completion, with the messages and options of its request."""

    __tablename__ = "stored_completions"

    request: Mapped[Json] = mapped_column(JSON)
    user_metadata: Mapped[Json | None] = mapped_column("metadata", JSONB(none_as_null=True))


class StoredResponse(Stored, Base):
    """A response, with the items of its own input; those before it are found by `previous_response_id`."""

    __tablename__ = "stored_responses"

    previous_response_id: Mapped[str | None] = mapped_column(String(64))  # may be gone since
    input_items: Mapped[list[Json]] = mapped_column(JSON)
