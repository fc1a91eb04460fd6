"""Add what pauses, exact resumes, estimates and repeated requests need."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_25_resume"
down_revision = "2026_11_23_create"
branch_labels = None
depends_on = None

_MOMENTS = ("claimed_at", "not_before", "pause_requested_at")


def upgrade() -> None:
    """Apply the change. Defaults of the server let older processes go on writing."""
    for name in _MOMENTS:
        op.add_column("jobs", sa.Column(name, sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("running_s", sa.Float(), server_default="0", nullable=False))
    op.add_column("checkpoints", sa.Column("resumable", sa.Boolean(), server_default="false", nullable=False))
    op.create_table(
        "idempotency_keys",
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("response", postgresql.JSONB(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_idempotency_keys_project_id"),
        sa.PrimaryKeyConstraint("project_id", "key", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_created_at", "idempotency_keys", ["created_at"])


def downgrade() -> None:
    """Take the change back; a paused job stays paused, which the older schema knows too."""
    op.drop_index("ix_idempotency_keys_created_at", table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
    op.drop_column("checkpoints", "resumable")
    op.drop_column("jobs", "running_s")
    for name in reversed(_MOMENTS):
        op.drop_column("jobs", name)
