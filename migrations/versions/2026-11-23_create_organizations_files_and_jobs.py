"""Create organizations, projects, keys, files, jobs, events, checkpoints and tuned models."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_23_create"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    _create_organizations()
    _create_projects()
    _create_api_keys()
    _create_files()
    _create_jobs()
    _create_job_events()
    _create_tuned_models()
    _create_checkpoints()


def _create_organizations() -> None:
    op.create_table(
        "organizations",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("slug", sa.String(length=64), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_organizations"),
        sa.UniqueConstraint("slug", name="uq_organizations_slug"),
    )


def _create_projects() -> None:
    op.create_table(
        "projects",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("organization_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.ForeignKeyConstraint(
            ["organization_id"], ["organizations.id"], name="fk_projects_organization_id"
        ),
        sa.PrimaryKeyConstraint("id", name="pk_projects"),
        sa.UniqueConstraint("name", name="uq_projects_name"),
    )


def _create_api_keys() -> None:
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("hint", sa.String(length=16), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.Column("revoked_at", _moment(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_api_keys_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_api_keys"),
        sa.UniqueConstraint("digest", name="uq_api_keys_digest"),
    )


def _create_files() -> None:
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("filename", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(length=32), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.Column("expires_at", _moment(), nullable=True),
        sa.Column("deleted_at", _moment(), nullable=True),
        sa.Column("purged_at", _moment(), nullable=True),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_files_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
        _one_of(
            "files",
            "purpose",
            ["fine-tune", "batch", "user_data", "assistants", "vision", "evals", "fine-tune-results"],
        ),
        _one_of("files", "status", ["uploaded", "processed", "error"]),
    )
    op.create_index(
        "ix_files_project_id_created_at_id", "files", ["project_id", "created_at", "id"], unique=False
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("organization_id", sa.String(length=64), nullable=False),
        sa.Column("status", sa.String(length=32), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("training_file", sa.String(), nullable=False),
        sa.Column("validation_file", sa.String(), nullable=True),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("hyperparameters", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("luthier", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("suffix", sa.String(), nullable=True),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("metadata", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.Column("started_at", _moment(), nullable=True),
        sa.Column("finished_at", _moment(), nullable=True),
        sa.Column("estimated_finish", _moment(), nullable=True),
        sa.Column("error", postgresql.JSONB(none_as_null=True, astext_type=sa.Text()), nullable=True),
        sa.Column("trained_tokens", sa.BigInteger(), nullable=True),
        sa.Column("result_file", sa.String(), nullable=True),
        sa.Column("fine_tuned_model", sa.String(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("deaths", sa.Integer(), nullable=False),
        sa.Column("worker", sa.String(), nullable=True),
        sa.Column("lease_expires_at", _moment(), nullable=True),
        sa.Column("hinted_at", _moment(), nullable=True),
        sa.ForeignKeyConstraint(["organization_id"], ["organizations.id"], name="fk_jobs_organization_id"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_jobs_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        _one_of(
            "jobs",
            "status",
            ["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"],
        ),
    )
    op.create_index(
        "ix_jobs_open", "jobs", ["status"], unique=False, postgresql_where=sa.text("finished_at IS NULL")
    )
    op.create_index(
        "ix_jobs_project_id_created_at_id", "jobs", ["project_id", "created_at", "id"], unique=False
    )


def _create_job_events() -> None:
    op.create_table(
        "job_events",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.BigInteger(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.Column("level", sa.String(length=32), nullable=False),
        sa.Column("type", sa.String(length=32), nullable=False),
        sa.Column("message", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("data", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_job_events_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_job_events"),
        _one_of("job_events", "level", ["info", "warn", "error"]),
        _one_of("job_events", "type", ["message", "metrics"]),
    )
    op.create_index("ix_job_events_job_id_sequence", "job_events", ["job_id", "sequence"], unique=False)
    op.create_index(
        "uq_job_events_step",
        "job_events",
        ["job_id", "step"],
        unique=True,
        postgresql_where=sa.text("type = 'metrics'"),
    )


def _create_tuned_models() -> None:
    op.create_table(
        "tuned_models",
        sa.Column("id", sa.String(length=256), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("base_model", sa.String(), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("storage_key", sa.String(), nullable=False),
        sa.Column("is_checkpoint", sa.Boolean(), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.Column("deleted_at", _moment(), nullable=True),
        sa.Column("purged_at", _moment(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_tuned_models_job_id"),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_tuned_models_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_tuned_models"),
        _one_of("tuned_models", "kind", ["lora", "full"]),
    )
    op.create_index(
        "ix_tuned_models_project_id_created_at_id",
        "tuned_models",
        ["project_id", "created_at", "id"],
        unique=False,
    )
    op.create_index("ix_tuned_models_storage_key", "tuned_models", ["storage_key"], unique=False)


def _create_checkpoints() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=False),
        sa.Column("model_id", sa.String(length=256), nullable=False),
        sa.Column("step_number", sa.Integer(), nullable=False),
        sa.Column("metrics", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("created_at", _moment(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name="fk_checkpoints_job_id"),
        sa.ForeignKeyConstraint(["model_id"], ["tuned_models.id"], name="fk_checkpoints_model_id"),
        sa.PrimaryKeyConstraint("id", name="pk_checkpoints"),
    )
    op.create_index(
        "ix_checkpoints_job_id_step_number", "checkpoints", ["job_id", "step_number"], unique=True
    )


def _moment() -> sa.DateTime:
    return sa.DateTime(timezone=True)


def _one_of(table: str, column: str, values: list[str]) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=op.f(f"ck_{table}_{column}"))


def downgrade() -> None:
    """Take the change back."""
    op.drop_index("ix_checkpoints_job_id_step_number", table_name="checkpoints")
    op.drop_table("checkpoints")
    op.drop_index("ix_tuned_models_storage_key", table_name="tuned_models")
    op.drop_index("ix_tuned_models_project_id_created_at_id", table_name="tuned_models")
    op.drop_table("tuned_models")
    op.drop_index("uq_job_events_step", table_name="job_events", postgresql_where=sa.text("type = 'metrics'"))
    op.drop_index("ix_job_events_job_id_sequence", table_name="job_events")
    op.drop_table("job_events")
    op.drop_index("ix_jobs_project_id_created_at_id", table_name="jobs")
    op.drop_index("ix_jobs_open", table_name="jobs", postgresql_where=sa.text("finished_at IS NULL"))
    op.drop_table("jobs")
    op.drop_index("ix_files_project_id_created_at_id", table_name="files")
    op.drop_table("files")
    op.drop_table("api_keys")
    op.drop_table("projects")
    op.drop_table("organizations")
