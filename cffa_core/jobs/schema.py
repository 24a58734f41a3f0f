"""Tables of the record, for SQLite and PostgreSQL, and the database's clock.

Times are seconds since 1970 (UTC) as the DATABASE sees them, never a caller's clock. Nothing here runs a statement;
``migrations`` brings a database to this schema and a test compares the two.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

METADATA = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

_Json = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
_Seconds: sa.Double[float] = sa.Double()
_Big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class clock(FunctionElement[float]):
    """The database's time in seconds since 1970, moving on inside a transaction."""

    type = sa.Double()
    inherit_cache = True


@compiles(clock, "sqlite")
def _sqlite_clock(element: clock, compiler: SQLCompiler, **kwargs: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(clock, "postgresql")
def _postgresql_clock(element: clock, compiler: SQLCompiler, **kwargs: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


jobs = sa.Table(
    "jobs",
    METADATA,
    sa.Column("number", _Big, primary_key=True, autoincrement=True, comment="order of arrival"),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("kind", sa.String(40), nullable=False),
    sa.Column("spec", _Json, nullable=False),
    sa.Column("spec_version", sa.Integer, nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("version", sa.Integer, nullable=False, comment="rises with every change; the ETag"),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("created_at", _Seconds, nullable=False),
    sa.Column("entered", _Json, nullable=False, comment="state -> time it was last entered"),
    sa.Column("last_seq", sa.Integer, nullable=False, comment="seq of the newest event"),
    sa.Column("requested", sa.Integer, nullable=False),
    sa.Column("generated", sa.Integer, nullable=False),
    sa.Column("busy_seconds", _Seconds, nullable=False, comment="time that training or committed parts took"),
    sa.Column("reason", sa.Text),
    sa.Column("error", _Json),
    sa.Column("result", _Json),
    sa.Column("numerics_key", sa.Text),
    sa.Column("waiting", sa.Integer, nullable=False, server_default="0", comment="units that may be claimed now"),
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
    sa.Column("lease_expires_at", _Seconds),
    sa.Column("crashes", sa.Integer, nullable=False, comment="in a row without progress"),
    sa.Column("crashes_since_result", sa.Integer, nullable=False, comment="since the last checkpoint"),
    sa.Column("expiries", sa.Integer, nullable=False, comment="lost workers in a row without progress"),
    sa.Column("claimed_at", _Seconds),
    sa.Column("finished_at", _Seconds),
    sa.Column("stage", sa.String(80)),
    sa.Column("current", sa.Integer, nullable=False),
    sa.Column("total", sa.Integer, nullable=False),
    sa.Column("pace_from", sa.Integer, nullable=False, comment="`current` when this stage was first reported"),
    sa.Column("pace_since", _Seconds, comment="time of that report"),
    sa.Column("reported_at", _Seconds, comment="time of the newest report"),
    sa.Column("stored", _Json),
    sa.Column("info", _Json),
    sa.Column("queued_at", _Seconds, comment="since when it waits, or waited, for this attempt"),
    sa.UniqueConstraint("job_id", "kind", "idx"),
    sa.Index("ix_units_job_id_state_idx", "job_id", "state", "idx"),
    sa.Index("ix_units_state_lease_expires_at", "state", "lease_expires_at"),
)

owners = sa.Table(
    "owners",
    METADATA,
    sa.Column("owner", sa.String(200), primary_key=True),
    sa.Column("served_turn", _Big, nullable=False, comment="rises at every claim; the smallest is served next"),
    sa.Index("ix_owners_served_turn_owner", "served_turn", "owner"),
)

events = sa.Table(
    "events",
    METADATA,
    sa.Column("job_id", sa.String(40), sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("at", _Seconds, nullable=False),
    sa.Column("type", sa.String(40), nullable=False),
    sa.Column("data", _Json, nullable=False),
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
    sa.Column("stored", _Json, nullable=False),
    sa.Column("created_at", _Seconds, nullable=False),
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
    sa.Column("number", _Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("pairs", sa.Integer, nullable=False),
    sa.Column("report", _Json, nullable=False),
    sa.Column("stored", _Json, nullable=False),
    sa.Column("created_at", _Seconds, nullable=False),
    sa.Index("ix_datasets_owner_number", "owner", "number"),
    sqlite_autoincrement=True,
)

models = sa.Table(
    "models",
    METADATA,
    sa.Column("number", _Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("job_id", sa.String(40), nullable=False, unique=True, comment="outlives its job: no foreign key"),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("card", _Json, nullable=False),
    sa.Column("stored", _Json, nullable=False),
    sa.Column("created_at", _Seconds, nullable=False),
    sa.Index("ix_models_owner_number", "owner", "number"),
    sqlite_autoincrement=True,
)

workers = sa.Table(
    "workers",
    METADATA,
    sa.Column("id", sa.String(200), primary_key=True),
    sa.Column("info", _Json, nullable=False),
    sa.Column("started_at", _Seconds, nullable=False),
    sa.Column("seen_at", _Seconds, nullable=False),
)

turns = sa.Table(
    "turns",
    METADATA,
    sa.Column("name", sa.String(80), primary_key=True, comment="of something that one process at a time does"),
    sa.Column("taken_at", _Seconds, nullable=False),
)
