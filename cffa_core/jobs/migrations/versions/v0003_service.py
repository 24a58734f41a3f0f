"""People, keys, limits, audit; web hooks; uploads; versions of data sets; gates, deadlines and retention of jobs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")
BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("limits", JSON, nullable=False, comment="what differs from the service's own limits"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("disabled_at", sa.Double(), nullable=True, comment="none of its keys is good since then"),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_accounts")),
    )
    op.create_table(
        "audit",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False, comment="who did it"),
        sa.Column("key_id", sa.String(length=40), nullable=True),
        sa.Column("action", sa.String(length=80), nullable=False, comment="e.g. job.create"),
        sa.Column("target", sa.String(length=200), nullable=True, comment="id of what it was done to"),
        sa.Column("request_id", sa.String(length=80), nullable=True),
        sa.Column("data", JSON, nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_audit")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_audit_owner_number", "audit", ["owner", "number"], unique=False)
    op.create_table(
        "uploads",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("files", JSON, nullable=False, comment="what is to come: path, size, object key, multipart id"),
        sa.Column("bytes", BIG, nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False, comment="open, checking, done, failed"),
        sa.Column("dataset_id", sa.String(length=40), nullable=True),
        sa.Column("error", JSON, nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_uploads")),
        sa.UniqueConstraint("id", name=op.f("uq_uploads_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_uploads_owner_number", "uploads", ["owner", "number"], unique=False)
    op.create_index("ix_uploads_state_expires_at", "uploads", ["state", "expires_at"], unique=False)
    op.create_table(
        "webhooks",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("events", JSON, nullable=False, comment="types it wants; empty: all"),
        sa.Column("secret", sa.String(length=200), nullable=False, comment="it signs, so it is kept as it is"),
        sa.Column("enabled", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True, comment="why it was switched off"),
        sa.Column("failures", sa.Integer(), nullable=False, comment="deliveries in a row that were given up"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_webhooks")),
        sa.UniqueConstraint("id", name=op.f("uq_webhooks_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_webhooks_owner_number", "webhooks", ["owner", "number"], unique=False)
    op.create_table(
        "api_keys",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("scope", sa.String(length=20), nullable=False, comment="viewer, researcher or admin"),
        sa.Column(
            "shown", sa.String(length=40), nullable=False, comment="the beginning of the key, to recognise it by"
        ),
        sa.Column("digest", sa.String(length=64), nullable=False, comment="HMAC-SHA256; the key itself is not kept"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("last_used_at", sa.Double(), nullable=True, comment="to the minute"),
        sa.ForeignKeyConstraint(["owner"], ["accounts.owner"], name=op.f("fk_api_keys_owner")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
        sa.UniqueConstraint("id", name=op.f("uq_api_keys_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_api_keys_owner"), "api_keys", ["owner"], unique=False)
    op.create_table(
        "deliveries",
        sa.Column("number", BIG, autoincrement=True, nullable=False),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("webhook_id", sa.String(length=40), nullable=False),
        sa.Column("message_id", sa.String(length=40), nullable=False, comment="webhook-id; a redelivery keeps it"),
        sa.Column("type", sa.String(length=40), nullable=False),
        sa.Column("body", sa.Text(), nullable=False, comment="the bytes that are signed"),
        sa.Column("state", sa.String(length=20), nullable=False, comment="waiting, sending, delivered, failed"),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column(
            "due_at",
            sa.Double(),
            nullable=True,
            comment="when it is tried next, or a send that is not heard of is taken up again",
        ),
        sa.Column("status", sa.Integer(), nullable=True, comment="the last HTTP status"),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True, comment="the last answer took"),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("finished_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["webhook_id"], ["webhooks.id"], name=op.f("fk_deliveries_webhook_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_deliveries")),
        sa.UniqueConstraint("id", name=op.f("uq_deliveries_id")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_deliveries_state_due_at", "deliveries", ["state", "due_at"], unique=False)
    op.create_index("ix_deliveries_webhook_id_number", "deliveries", ["webhook_id", "number"], unique=False)
    op.add_column("datasets", sa.Column("version", sa.Integer(), server_default="1", nullable=False))
    op.add_column(
        "datasets",
        sa.Column("parent_id", sa.String(length=40), nullable=True, comment="the version that this one was made from"),
    )
    op.add_column(
        "datasets", sa.Column("split", JSON, nullable=True, comment="train, validation, test -> names of pairs; by eye")
    )
    op.add_column(
        "jobs",
        sa.Column(
            "accepted", sa.Integer(), server_default="0", nullable=False, comment="slots of a gate that are filled"
        ),
    )
    op.add_column(
        "jobs",
        sa.Column("rejected", sa.Integer(), server_default="0", nullable=False, comment="pairs that a gate refused"),
    )
    op.add_column(
        "jobs",
        sa.Column(
            "exhausted", sa.Integer(), server_default="0", nullable=False, comment="slots given up after max_tries"
        ),
    )
    op.add_column(
        "jobs", sa.Column("deadline_at", sa.Double(), nullable=True, comment="a job that is not over by then fails")
    )
    op.add_column(
        "jobs",
        sa.Column(
            "retention_seconds",
            sa.Double(),
            nullable=True,
            comment="how long products are kept once the job is over; NULL: for ever",
        ),
    )
    op.add_column("jobs", sa.Column("expires_at", sa.Double(), nullable=True, comment="when the products are removed"))
    op.add_column(
        "jobs",
        sa.Column(
            "wishes",
            JSON,
            nullable=True,
            comment="what a running training was asked for and has not done: checkpoint, sample",
        ),
    )
    op.create_index(
        "ix_jobs_deadline_at",
        "jobs",
        ["deadline_at"],
        unique=False,
        sqlite_where=sa.text("deadline_at IS NOT NULL"),
        postgresql_where=sa.text("deadline_at IS NOT NULL"),
    )
    op.create_index(
        "ix_jobs_expires_at",
        "jobs",
        ["expires_at"],
        unique=False,
        sqlite_where=sa.text("expires_at IS NOT NULL"),
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_index("ix_jobs_expires_at", table_name="jobs")
    op.drop_index("ix_jobs_deadline_at", table_name="jobs")
    op.drop_column("jobs", "wishes")
    op.drop_column("jobs", "expires_at")
    op.drop_column("jobs", "retention_seconds")
    op.drop_column("jobs", "deadline_at")
    op.drop_column("jobs", "exhausted")
    op.drop_column("jobs", "rejected")
    op.drop_column("jobs", "accepted")
    op.drop_column("datasets", "split")
    op.drop_column("datasets", "parent_id")
    op.drop_column("datasets", "version")
    op.drop_index("ix_deliveries_webhook_id_number", table_name="deliveries")
    op.drop_index("ix_deliveries_state_due_at", table_name="deliveries")
    op.drop_table("deliveries")
    op.drop_index(op.f("ix_api_keys_owner"), table_name="api_keys")
    op.drop_table("api_keys")
    op.drop_index("ix_webhooks_owner_number", table_name="webhooks")
    op.drop_table("webhooks")
    op.drop_index("ix_uploads_state_expires_at", table_name="uploads")
    op.drop_index("ix_uploads_owner_number", table_name="uploads")
    op.drop_table("uploads")
    op.drop_index("ix_audit_owner_number", table_name="audit")
    op.drop_table("audit")
    op.drop_table("accounts")
