"""The schema and its migrations on each database, transactions, and the settings of SQLite that durability rests on."""

from __future__ import annotations

import sqlite3
import time
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.schema import CreateTable

from cffa_core.errors import RecordOutdated, StorageUnavailable
from cffa_core.jobs.database import Database, migrations
from cffa_core.jobs.schema import METADATA, clock
from cffa_core.jobs.spec import GenerationSpec, Kind
from cffa_core.jobs.state import UnitState
from cffa_core.jobs.store import JobStore
from tests.record_cases import claimed, generation_job, trained_model
from tests.record_servers import Records


def migrated(folder: Path) -> Database:
    database = Database(f"sqlite:///{folder / 'record.sqlite'}")
    database.migrate()
    return database


def test_the_migrations_lead_to_the_schema(record_url: str) -> None:
    database = Database(record_url)
    found = database.read(
        lambda connection: compare_metadata(
            MigrationContext.configure(connection, opts={"compare_type": True}), METADATA
        )
    )
    assert found == []
    database.close()


def test_migrating_again_changes_nothing(record_url: str) -> None:
    database = Database(record_url)
    database.write(lambda connection: connection.exec_driver_sql("INSERT INTO owners VALUES ('a', 3)"))
    database.migrate()
    assert scalar(database, "SELECT served_turn FROM owners") == 3
    database.close()


def test_a_record_of_the_first_version_goes_on_with_what_it_has(records: Records) -> None:
    url = records.bare()
    database = Database(url)
    database.migrate("0001")
    spec = GenerationSpec(model_id="mdl_" + "0" * 20, count=12, part_size=4).model_dump_json()
    job = (
        "INSERT INTO jobs (id, owner, kind, spec, spec_version, state, version, priority, created_at, entered,"
        " last_seq, requested, generated, busy_seconds) VALUES ('{id}', 'a', 'generation', '{spec}', 1, '{state}', 1,"
        " 0, 1000.5, '{{}}', 0, 12, 0, 0)"
    )
    unit = (
        "INSERT INTO units (id, job_id, kind, idx, state, attempt, crashes, crashes_since_result, expiries, current,"
        " total, pace_from) VALUES ('{id}', '{job}', 'part', {idx}, '{state}', {attempt}, 0, 0, 0, 0, 0, 0)"
    )
    statements = ["INSERT INTO owners VALUES ('a', 3)"]
    for name, state in (("job_running", "running"), ("job_paused", "paused")):
        statements.append(job.format(id=name, spec=spec, state=state))
        for idx, unit_state in enumerate(("done", "queued", "queued")):
            statements.append(unit.format(id=f"{name}{idx}", job=name, idx=idx, state=unit_state, attempt=1 - idx // 2))
    for statement in statements:
        database.write(partial(run, statement=statement))
    database.close()

    store = JobStore(url)
    with pytest.raises(RecordOutdated):
        store.require_schema()
    store.migrate()
    store.require_schema()
    load = store.load()
    assert load.units[Kind.GENERATION, UnitState.QUEUED] == 2
    assert load.oldest_seconds[Kind.GENERATION] > 1e9  # since 1970
    claims = [store.claim("w", list(Kind), lease_seconds=30.0) for _ in range(3)]
    assert [claim and (claim.job_id, claim.index, claim.attempt) for claim in claims] == [
        ("job_running", 1, 2),
        ("job_running", 2, 1),
        None,
    ]
    store.resume_job("a", "job_paused")
    assert store.load().units[Kind.GENERATION, UnitState.QUEUED] == 2
    store.close()


def test_going_back_a_version_keeps_the_rows(records: Records) -> None:
    url = records.bare()
    store = JobStore(url)
    store.migrate()
    job = generation_job(store, trained_model(store), parts=2)
    store.close()
    database = Database(url)
    database.write(lambda connection: command.downgrade(migrations(connection), "0001"))
    assert scalar(database, "SELECT count(*) FROM units WHERE kind = 'part'") == 2
    database.migrate()
    database.close()
    store = JobStore(url)
    assert [claimed(store).job_id for _ in range(2)] == [job.id, job.id]
    store.close()


def run(connection: sa.Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)


def scalar(database: Database, statement: str) -> object:
    return database.read(lambda connection: connection.exec_driver_sql(statement).scalar_one())


def test_sqlite_is_durable_and_checks_references(tmp_path: Path) -> None:
    database = migrated(tmp_path)

    def check(connection: sa.Connection) -> None:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one() >= 10_000
        with pytest.raises(sa.exc.IntegrityError):
            connection.exec_driver_sql("INSERT INTO events VALUES ('job_none', 1, 0, 'x', '{}')")

    database.write(check)
    database.close()


def test_a_write_locks_from_its_first_statement_and_reads_go_on(tmp_path: Path) -> None:
    database = migrated(tmp_path)

    def check(_: sa.Connection) -> None:
        other = sqlite3.connect(tmp_path / "record.sqlite", timeout=0.05)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
        other.close()

    database.write(check)
    database.close()


def test_a_raised_error_undoes_the_whole_transaction(record_url: str) -> None:
    database = Database(record_url)

    def half(connection: sa.Connection) -> None:
        connection.exec_driver_sql("INSERT INTO owners VALUES ('a', 0)")
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError):
        database.write(half)
    assert scalar(database, "SELECT count(*) FROM owners") == 0
    database.close()


def test_a_read_is_one_view(record_url: str) -> None:
    database = Database(record_url)

    def look(connection: sa.Connection) -> tuple[object, object]:
        before = connection.exec_driver_sql("SELECT count(*) FROM owners").scalar_one()
        database.write(lambda other: other.exec_driver_sql("INSERT INTO owners VALUES ('a', 0)"))
        return before, connection.exec_driver_sql("SELECT count(*) FROM owners").scalar_one()

    assert database.read(look) == (0, 0)
    assert scalar(database, "SELECT count(*) FROM owners") == 1
    database.close()


def test_the_clock_is_seconds_of_utc_and_moves(record_url: str) -> None:
    database = Database(record_url)

    def look(connection: sa.Connection) -> list[float]:
        return [connection.execute(sa.select(clock())).scalar_one() for _ in range(2)]

    before = time.time()
    told = database.read(look)
    assert before - 1.0 <= told[0] <= told[1] <= time.time() + 1.0
    time.sleep(0.01)
    assert told[1] < database.read(look)[0]
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
