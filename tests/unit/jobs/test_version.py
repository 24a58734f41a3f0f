"""Which schemas the code works with: its own and newer ones, not older ones, not an empty database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cffa_core.errors import RecordOutdated
from cffa_core.jobs.store import JobStore


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    opened = JobStore(f"sqlite:///{tmp_path / 'record.sqlite'}")
    yield opened
    opened.close()


def pretend(tmp_path: Path, revision: str) -> None:
    engine = sa.create_engine(f"sqlite:///{tmp_path / 'record.sqlite'}")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :to"), {"to": revision})
    engine.dispose()


def test_an_empty_database_is_not_set_up(store: JobStore) -> None:
    with pytest.raises(RecordOutdated, match="empty"):
        store.require_schema()


def test_a_migrated_one_is(store: JobStore) -> None:
    store.migrate()
    store.require_schema()


def test_an_older_schema_is_refused(store: JobStore, tmp_path: Path) -> None:
    store.migrate()
    pretend(tmp_path, "0001")
    with pytest.raises(RecordOutdated, match=r"is 0001, this version needs .*services\.api\.setup"):
        store.require_schema()


def test_a_newer_schema_serves_old_processes_on(store: JobStore, tmp_path: Path) -> None:
    store.migrate()
    pretend(tmp_path, "9999")
    store.require_schema()
