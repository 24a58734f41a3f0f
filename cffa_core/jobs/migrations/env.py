"""Alembic environment of the record; it runs inside the transaction that ``Database.migrate`` opened."""

from __future__ import annotations

from alembic import context

from cffa_core.jobs.schema import METADATA

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=METADATA,
    transactional_ddl=True,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
