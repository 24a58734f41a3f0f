"""The record: jobs, units, events, metrics, checkpoints, data sets, models, workers."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _json() -> sa.types.TypeEngine[Any]:
    return sa.JSON().with_variant(JSONB(), "postgresql")


def _big() -> sa.types.TypeEngine[Any]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("number", _big(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("pairs", sa.Integer(), nullable=False),
        sa.Column("report", _json(), nullable=False),
        sa.Column("stored", _json(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_datasets")),
        sa.UniqueConstraint("id", name=op.f("uq_datasets_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_datasets_owner_number", "datasets", ["owner", "number"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("number", _big(), autoincrement=True, nullable=False, comment="order of arrival"),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("kind", sa.String(length=40), nullable=False),
        sa.Column("spec", _json(), nullable=False),
        sa.Column("spec_version", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False, comment="rises with every change; the ETag"),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("entered", _json(), nullable=False, comment="state -> time it was last entered"),
        sa.Column("last_seq", sa.Integer(), nullable=False, comment="seq of the newest event"),
        sa.Column("requested", sa.Integer(), nullable=False),
        sa.Column("generated", sa.Integer(), nullable=False),
        sa.Column("busy_seconds", sa.Double(), nullable=False, comment="time that committed parts took, for the ETA"),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("error", _json(), nullable=True),
        sa.Column("result", _json(), nullable=True),
        sa.Column("numerics_key", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_jobs")),
        sa.UniqueConstraint("id", name=op.f("uq_jobs_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_jobs_owner_number", "jobs", ["owner", "number"], unique=False)
    op.create_index("ix_jobs_state_kind", "jobs", ["state", "kind"], unique=False)
    op.create_table(
        "models",
        sa.Column("number", _big(), autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False, comment="outlives its job: no foreign key"),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("card", _json(), nullable=False),
        sa.Column("stored", _json(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_models")),
        sa.UniqueConstraint("id", name=op.f("uq_models_id")),
        sa.UniqueConstraint("job_id", name=op.f("uq_models_job_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_models_owner_number", "models", ["owner", "number"], unique=False)
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("served_turn", _big(), nullable=False, comment="rises at every claim; the smallest is served next"),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_owners")),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=200), nullable=False),
        sa.Column("info", _json(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "events",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("type", sa.String(length=40), nullable=False),
        sa.Column("data", _json(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_events_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "seq", name=op.f("pk_events")),
    )
    op.create_table(
        "idempotency",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_idempotency_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency")),
    )
    op.create_index(op.f("ix_idempotency_job_id"), "idempotency", ["job_id"], unique=False)
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(length=200), nullable=False),
        sa.Column("value", sa.Double(), nullable=True, comment="NULL is not-a-number"),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_metrics_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "step", "key", name=op.f("pk_metrics")),
    )
    op.create_table(
        "units",
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("job_id", sa.String(length=40), nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("idx", sa.Integer(), nullable=False, comment="which part; 0 for the others"),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False, comment="rises at every claim and is never reset"),
        sa.Column("worker_id", sa.String(length=200), nullable=True),
        sa.Column("lease_expires_at", sa.Double(), nullable=True),
        sa.Column("crashes", sa.Integer(), nullable=False, comment="in a row without progress"),
        sa.Column("crashes_since_result", sa.Integer(), nullable=False, comment="since the last checkpoint"),
        sa.Column("expiries", sa.Integer(), nullable=False, comment="lost workers in a row without progress"),
        sa.Column("claimed_at", sa.Double(), nullable=True),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.Column("stage", sa.String(length=80), nullable=True),
        sa.Column("current", sa.Integer(), nullable=False),
        sa.Column("total", sa.Integer(), nullable=False),
        sa.Column("pace_from", sa.Integer(), nullable=False, comment="`current` when this stage was first reported"),
        sa.Column("pace_since", sa.Double(), nullable=True, comment="time of that report"),
        sa.Column("reported_at", sa.Double(), nullable=True, comment="time of the newest report"),
        sa.Column("stored", _json(), nullable=True),
        sa.Column("info", _json(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_units_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_units")),
        sa.UniqueConstraint("job_id", "kind", "idx", name=op.f("uq_units_job_id_kind_idx")),
    )
    op.create_index("ix_units_job_id_state_idx", "units", ["job_id", "state", "idx"], unique=False)
    op.create_index("ix_units_state_lease_expires_at", "units", ["state", "lease_expires_at"], unique=False)
    op.create_table(
        "checkpoints",
        sa.Column("unit_id", sa.String(length=40), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("stored", _json(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["unit_id"], ["units.id"], name=op.f("fk_checkpoints_unit_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("unit_id", "step", name=op.f("pk_checkpoints")),
    )


def downgrade() -> None:
    op.drop_table("checkpoints")
    op.drop_index("ix_units_state_lease_expires_at", table_name="units")
    op.drop_index("ix_units_job_id_state_idx", table_name="units")
    op.drop_table("units")
    op.drop_table("metrics")
    op.drop_index(op.f("ix_idempotency_job_id"), table_name="idempotency")
    op.drop_table("idempotency")
    op.drop_table("events")
    op.drop_table("workers")
    op.drop_table("owners")
    op.drop_index("ix_models_owner_number", table_name="models")
    op.drop_table("models")
    op.drop_index("ix_jobs_state_kind", table_name="jobs")
    op.drop_index("ix_jobs_owner_number", table_name="jobs")
    op.drop_table("jobs")
    op.drop_index("ix_datasets_owner_number", table_name="datasets")
    op.drop_table("datasets")
