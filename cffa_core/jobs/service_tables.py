"""Tables of the record beside the jobs: people and their keys, the audit log, web hooks, uploads in progress.

They share :data:`METADATA` and the database's clock with ``schema``, which imports this module so that one migration
history covers both. Nothing here runs a statement.
"""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.jobs.table_types import METADATA, Big, Json, Seconds

accounts = sa.Table(
    "accounts",
    METADATA,
    sa.Column("owner", sa.String(200), primary_key=True),
    sa.Column("limits", Json, nullable=False, comment="what differs from the service's own limits"),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("disabled_at", Seconds, comment="none of its keys is good since then"),
)

api_keys = sa.Table(
    "api_keys",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), sa.ForeignKey("accounts.owner"), nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("scope", sa.String(20), nullable=False, comment="viewer, researcher or admin"),
    sa.Column("shown", sa.String(40), nullable=False, comment="the beginning of the key, to recognise it by"),
    sa.Column("digest", sa.String(64), nullable=False, unique=True, comment="HMAC-SHA256; the key itself is not kept"),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("expires_at", Seconds),
    sa.Column("revoked_at", Seconds),
    sa.Column("last_used_at", Seconds, comment="to the minute"),
    sqlite_autoincrement=True,
)

audit = sa.Table(
    "audit",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("at", Seconds, nullable=False),
    sa.Column("owner", sa.String(200), nullable=False, comment="who did it"),
    sa.Column("key_id", sa.String(40)),
    sa.Column("action", sa.String(80), nullable=False, comment="e.g. job.create"),
    sa.Column("target", sa.String(200), comment="id of what it was done to"),
    sa.Column("request_id", sa.String(80)),
    sa.Column("data", Json, nullable=False),
    sa.Index("ix_audit_owner_number", "owner", "number"),
    sqlite_autoincrement=True,
)

webhooks = sa.Table(
    "webhooks",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("events", Json, nullable=False, comment="types it wants; empty: all"),
    sa.Column("secret", sa.String(200), nullable=False, comment="it signs, so it is kept as it is"),
    sa.Column("enabled", sa.Boolean, nullable=False),
    sa.Column("reason", sa.Text, comment="why it was switched off"),
    sa.Column("failures", sa.Integer, nullable=False, comment="deliveries in a row that were given up"),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Index("ix_webhooks_owner_number", "owner", "number"),
    sqlite_autoincrement=True,
)

webhook_keys = sa.Table(
    "webhook_keys",
    METADATA,
    sa.Column("owner", sa.String(200), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("secret_sha256", sa.String(64), nullable=False, comment="of the secret that the post was answered with"),
    sa.Column(
        "webhook_id", sa.String(40), sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False, index=True
    ),
)

post_keys = sa.Table(
    "post_keys",
    METADATA,
    sa.Column("owner", sa.String(200), primary_key=True, comment="who posted"),
    sa.Column("makes", sa.String(20), primary_key=True, comment="account, api_key, webhook_secret"),
    sa.Column("key_sha256", sa.String(64), primary_key=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
    sa.Column("made", sa.String(200), nullable=False, comment="name of the account, id of the key or the web hook"),
    sa.Column("mark", sa.String(64), comment="of that call alone; an API key's goes after a day"),
    sa.Column("at", Seconds, nullable=False),
)

deliveries = sa.Table(
    "deliveries",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("webhook_id", sa.String(40), sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    sa.Column("message_id", sa.String(40), nullable=False, comment="webhook-id; a redelivery keeps it"),
    sa.Column("type", sa.String(40), nullable=False),
    sa.Column("body", sa.Text, nullable=False, comment="the bytes that are signed"),
    sa.Column("state", sa.String(20), nullable=False, comment="waiting, sending, delivered, failed"),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("due_at", Seconds, comment="when it is tried next, or a send that is not heard of is taken up again"),
    sa.Column("status", sa.Integer, comment="the last HTTP status"),
    sa.Column("error", sa.Text),
    sa.Column("seconds", Seconds, comment="the last answer took"),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("finished_at", Seconds),
    sa.Index("ix_deliveries_webhook_id_number", "webhook_id", "number"),
    sa.Index("ix_deliveries_state_due_at", "state", "due_at"),
    sqlite_autoincrement=True,
)

uploads = sa.Table(
    "uploads",
    METADATA,
    sa.Column("number", Big, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("files", Json, nullable=False, comment="what is to come: path, size, object key, multipart id"),
    sa.Column("bytes", Big, nullable=False),
    sa.Column("state", sa.String(20), nullable=False, comment="open, checking, done, failed"),
    sa.Column("dataset_id", sa.String(40)),
    sa.Column("error", Json),
    sa.Column("created_at", Seconds, nullable=False),
    sa.Column("expires_at", Seconds, nullable=False),
    sa.Index("ix_uploads_owner_number", "owner", "number"),
    sa.Index("ix_uploads_state_expires_at", "state", "expires_at"),
    sqlite_autoincrement=True,
)
