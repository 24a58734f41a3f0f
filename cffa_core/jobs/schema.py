"""Tables of the record: jobs, units, their history, data sets and models, workers; for SQLite and PostgreSQL.

Times are seconds since 1970 (UTC) as the DATABASE sees them, never a caller's clock. Nothing here runs a statement;
``migrations`` brings a database to this schema and a test compares the two. ``service_tables`` holds the others.
"""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.jobs import service_tables
from cffa_core.jobs.table_types import METADATA, Big, Json, Seconds, clock

__all__ = [
    "METADATA",
    "QUEUE",
    "checkpoints",
    "clock",
    "datasets",
    "events",
    "idempotency",
    "jobs",
    "metrics",
    "models",
    "owners",
    "service_tables",
    "turns",
    "units",
    "workers",
]

jobs = sa.Table(
    "jobs",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True, comment="order of arrival"),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("spec", Json, nullable=False),
    sa.Column("spec_version", sa.Integer, nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("version", sa.Integer, nullable=False, comment="rises with every change; the ETag"),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("entered", Json, nullable=False, comment="state -> time it was last entered"),
    sa.Column("last_seq", sa.Integer, nullable=False, comment="seq of the newest event"),
    sa.Column("requested", sa.Integer, nullable=False),
    sa.Column("generated", sa.Integer, nullable=False),
    sa.Column("accepted", sa.Integer, nullable=False, server_default="0", comment="slots of a gate that are filled"),
    sa.Column("rejected", sa.Integer, nullable=False, server_default="0", comment="pairs that a gate refused"),
    sa.Column("exhausted", sa.Integer, nullable=False, server_default="0", comment="slots given up after max_tries"),
    sa.Column("busy_seconds", Seconds, nullable=False, comment="time that training or committed parts took"),
    sa.Column("reason", sa.Text),
    sa.Column("error", Json),
    sa.Column("result", Json),
    sa.Column("numerics_key", sa.Text),
    sa.Column("waiting", sa.Integer, nullable=False, server_default="0", comment="units that may be claimed now"),
    sa.Column("deadline_at", Seconds, comment="a job that is not over by then fails"),
    sa.Column("retention_seconds", Seconds, comment="how long products are kept once the job is over; NULL: for ever"),
    sa.Column("expires_at", Seconds, comment="when the products are removed"),
    sa.Column("wishes", Json, comment="what a running training was asked for and has not done: checkpoint, sample"),
    sa.Index("ix_jobs_owner_number", "owner", "number"),
    sa.Index("ix_jobs_state_kind", "state", "kind"),
    # The queue: small whatever the number of jobs that are over.
    sa.Index(
        "ix_jobs_queue",
        "owner",
        "kind",
        "priority",
        "number",
        sqlite_where=sa.text("waiting > 0"),
        postgresql_where=sa.text("waiting > 0"),
    ),
    # What the sweep asks for: few rows, however many jobs there are.
    sa.Index(
        "ix_jobs_deadline_at",
        "deadline_at",
        sqlite_where=sa.text("deadline_at IS NOT NULL"),
        postgresql_where=sa.text("deadline_at IS NOT NULL"),
    ),
    sa.Index(
        "ix_jobs_expires_at",
        "expires_at",
        sqlite_where=sa.text("expires_at IS NOT NULL"),
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    ),
    sa.Index(
        "ix_jobs_measured",
        "kind",
        "number",
        sqlite_where=sa.text("busy_seconds > 0"),
        postgresql_where=sa.text("busy_seconds > 0"),
    ),
    sqlite_autoincrement=True,
)

QUEUE: sa.ColumnElement[bool] = sa.literal_column("jobs.waiting > 0", sa.Boolean())
"""Whether units of a job may be claimed; written out, since partial indices are found by their words."""

units = sa.Table(
    "units",
    METADATA,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),
    sa.Column("idx", sa.Integer, nullable=False, comment="which part; 0 for the others"),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, comment="rises at every claim and is never reset"),
    sa.Column("worker_id", sa.String(200)),
    sa.Column("lease_expires_at", Seconds),
    sa.Column("crashes", sa.Integer, nullable=False, comment="in a row without progress"),
    sa.Column("crashes_since_result", sa.Integer, nullable=False, comment="since the last checkpoint"),
    sa.Column("expiries", sa.Integer, nullable=False, comment="lost workers in a row without progress"),
    sa.Column("claimed_at", Seconds),
    sa.Column("finished_at", Seconds),
    sa.Column("stage", sa.String(80)),
    sa.Column("current", sa.Integer, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("pace_from", sa.Integer, nullable=False, comment="`current` when this stage was first reported"),
    sa.Column("pace_since", Seconds, comment="time of that report"),
    sa.Column("reported_at", Seconds, comment="time of the newest report"),
    sa.Column("stored", Json),
    sa.Column("info", Json),
    sa.Column("queued_at", Seconds, comment="since when it waits, or waited, for this attempt"),
    sa.UniqueConstraint("job_id", "kind", "idx"),
    sa.Index("ix_units_job_id_state_idx", "job_id", "state", "idx"),
    sa.Index("ix_units_state_lease_expires_at", "state", "lease_expires_at"),
)

owners = sa.Table(
    "owners",
    METADATA,
    sa.Column("owner", sa.String(200), primary_key=True),
    sa.Column("served_turn", Big, nullable=False, comment="rises at every claim; the smallest is served next"),
    sa.Index("ix_owners_served_turn_owner", "served_turn", "owner"),
)

events = sa.Table(
    "events",
    METADATA,
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at", Seconds, nullable=False),
    sa.Column("type", sa.String(40), nullable=False),
    sa.Column("data", Json, nullable=False),
)

metrics = sa.Table(
    "metrics",
    METADATA,
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(200), primary_key=True),
    sa.Column("value", sa.Double, comment="NULL is not-a-number"),
)

checkpoints = sa.Table(
    "checkpoints",
    METADATA,
    sa.Column("unit_id", sa.String(40), sa.ForeignKey("units.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("step", sa.Integer, primary_key=True),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("stored", Json, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    METADATA,
    sa.Column("owner", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
)

datasets = sa.Table(
    "datasets",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("pairs", sa.Integer, nullable=False),
    sa.Column("report", Json, nullable=False),
    sa.Column("stored", Json, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("parent_id", sa.String(40), comment="the version that this one was made from"),
    sa.Column("split", Json, comment="train, validation, test -> names of pairs; by eye"),
    sa.Index("ix_datasets_owner_number", "owner", "number"),
    sqlite_autoincrement=True,
)

models = sa.Table(
    "models",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("job_id", sa.String(40), nullable=False, unique=True, comment="outlives its job: no foreign key"),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("card", Json, nullable=False),
    sa.Column("stored", Json, nullable=False),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Index("ix_models_owner_number", "owner", "number"),
    sqlite_autoincrement=True,
)

workers = sa.Table(
    "workers",
    METADATA,
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("info", Json, nullable=False),
    sa.Column("started_at", Seconds, nullable=False),
    sa.Column("seen_at", Seconds, nullable=False),
)

turns = sa.Table(
    "turns",
    METADATA,
    sa.Column("name", sa.String(80), primary_key=True, comment="of something that one process at a time does"),
    sa.Column("taken_at", Seconds, nullable=False),
)
