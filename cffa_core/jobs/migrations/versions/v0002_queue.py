"""The queue: waiting units counted on their job and dated, indices for the claim; turns that one process takes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "turns",
        sa.Column("name", sa.String(length=80), nullable=False, comment="of something that one process at a time does"),
        sa.Column("taken_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_turns")),
    )
    op.create_index("ix_owners_served_turn_owner", "owners", ["served_turn", "owner"], unique=False)
    op.add_column(
        "jobs",
        sa.Column("waiting", sa.Integer(), server_default="0", nullable=False, comment="units that may be claimed now"),
    )
    op.add_column(
        "units",
        sa.Column("queued_at", sa.Double(), nullable=True, comment="since when it waits, or waited, for this attempt"),
    )
    op.execute(
        "UPDATE jobs SET waiting = (SELECT count(*) FROM units WHERE units.job_id = jobs.id AND units.state = 'queued')"
        " WHERE state IN ('queued', 'running', 'finalizing')"
    )
    op.execute(
        "UPDATE units SET queued_at = (SELECT jobs.created_at FROM jobs WHERE jobs.id = units.job_id)"
        " WHERE state = 'queued'"
    )
    _comment_on_busy_seconds("time that training or committed parts took")
    for name, columns, where in (
        ("ix_jobs_queue", ["owner", "kind", "priority", "number"], "waiting > 0"),
        ("ix_jobs_measured", ["kind", "number"], "busy_seconds > 0"),
    ):
        op.create_index(
            name, "jobs", columns, unique=False, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
        )


def downgrade() -> None:
    _comment_on_busy_seconds("time that committed parts took, for the ETA")
    op.drop_index("ix_jobs_measured", table_name="jobs")
    op.drop_index("ix_jobs_queue", table_name="jobs")
    # Not in batch mode: that would drop and remake `jobs` on SQLite, and all that refers to it would go along.
    op.drop_column("units", "queued_at")
    op.drop_column("jobs", "waiting")
    op.drop_index("ix_owners_served_turn_owner", table_name="owners")
    op.drop_table("turns")


def _comment_on_busy_seconds(comment: str) -> None:
    if op.get_bind().dialect.supports_comments:
        op.alter_column("jobs", "busy_seconds", existing_type=sa.Double(), existing_nullable=False, comment=comment)
