"""Idempotency keys of posts that make accounts, API keys and new secrets of web hooks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "post_keys",
        sa.Column("owner", sa.String(length=200), nullable=False, comment="who posted"),
        sa.Column("makes", sa.String(length=20), nullable=False, comment="account, api_key, webhook_secret"),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("body_sha256", sa.String(length=64), nullable=False),
        sa.Column(
            "made", sa.String(length=200), nullable=False, comment="name of the account, id of the key or the web hook"
        ),
        sa.Column(
            "mark", sa.String(length=64), nullable=True, comment="of that call alone; an API key's goes after a day"
        ),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "makes", "key_sha256", name=op.f("pk_post_keys")),
    )


def downgrade() -> None:
    op.drop_table("post_keys")
