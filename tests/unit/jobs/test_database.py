"""The schema, its migrations and the settings of SQLite that durability rests on."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from cffa_core.errors import StorageUnavailable
from cffa_core.jobs.database import Database
from cffa_core.jobs.schema import METADATA, clock
from cffa_core.jobs.store import JobStore


def migrated(folder: Path) -> Database:
    database = Database(f"sqlite:///{folder / 'record.sqlite'}")
    database.migrate()
    return database


def test_the_migrations_lead_to_the_schema(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, METADATA) == []
    database.close()


def test_migrating_again_changes_nothing(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with database.write() as connection:
        connection.exec_driver_sql("INSERT INTO owners VALUES ('a', 3)")
    database.migrate()
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT served_turn FROM owners").scalar_one() == 3
    database.close()


def test_sqlite_is_durable_and_checks_references(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with database.write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() >= 10_000
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql("INSERT INTO events VALUES ('job_none', 1, 0, 'x', '{}')")
    database.close()


def test_a_write_locks_from_its_first_statement_and_reads_go_on(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with database.write():
        other = sqlite3.connect(tmp_path / "record.sqlite", timeout=0.05)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
        other.close()
    database.close()


def test_a_raised_error_undoes_the_whole_transaction(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with pytest.raises(RuntimeError), database.write() as connection:
        connection.exec_driver_sql("INSERT INTO owners VALUES ('a', 0)")
        raise RuntimeError("half-way")
    with database.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM owners").scalar_one() == 0
    database.close()


def test_the_clock_is_seconds_of_utc_and_moves(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with database.read() as connection:
        told = connection.scalar(sa.select(clock()))
        by_sqlite = connection.exec_driver_sql("SELECT CAST(strftime('%s', 'now') AS INTEGER)").scalar_one()
    assert told is not None
    assert by_sqlite - 1 <= told <= by_sqlite + 1.5
    database.close()


def test_an_unreachable_record_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "record.sqlite").mkdir()
    store = JobStore(f"sqlite:///{tmp_path / 'record.sqlite'}")
    with pytest.raises(StorageUnavailable):
        store.ping()


def test_a_record_that_was_never_migrated_does_not_answer(tmp_path: Path) -> None:
    store = JobStore(f"sqlite:///{tmp_path / 'record.sqlite'}")
    with pytest.raises(StorageUnavailable):
        store.ping()
    store.migrate()
    store.ping()
    store.close()


def test_a_file_that_is_no_database_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "record.sqlite").write_bytes(b"this is not a database" * 100)
    store = JobStore(f"sqlite:///{tmp_path / 'record.sqlite'}")
    with pytest.raises(StorageUnavailable):
        store.ping()


@pytest.mark.parametrize("dialect", [sqlite.dialect(), postgresql.dialect()], ids=["sqlite", "postgresql"])
def test_the_schema_and_the_clock_are_written_for_both_databases(dialect: sa.Dialect) -> None:
    for table in METADATA.sorted_tables:
        assert f"CREATE TABLE {table.name}" in str(CreateTable(table).compile(dialect=dialect))
    assert {"sqlite": "julianday", "postgresql": "clock_timestamp()"}[dialect.name] in str(
        sa.select(clock()).compile(dialect=dialect)
    )
