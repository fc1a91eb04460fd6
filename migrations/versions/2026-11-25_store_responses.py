"""Add stored responses."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "2026_11_25_store_responses"
down_revision = "2026_11_25_store_completions"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the change."""
    op.create_table(
        "stored_responses",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("project_id", sa.String(length=64), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("response", postgresql.JSON(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("previous_response_id", sa.String(length=64), nullable=True),
        sa.Column("input_items", postgresql.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name="fk_stored_responses_project_id"),
        sa.PrimaryKeyConstraint("id", name="pk_stored_responses"),
    )
    op.create_index(
        "ix_stored_responses_project_id_created_at_id",
        "stored_responses",
        ["project_id", "created_at", "id"],
        postgresql_include=["size_bytes"],
    )


def downgrade() -> None:
    """Take the change back, and with it what was stored."""
    op.drop_index("ix_stored_responses_project_id_created_at_id", table_name="stored_responses")
    op.drop_table("stored_responses")
