"""PostgreSQL: how transactions are bounded, repeated and told apart; what an unreachable server looks like."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, StorageUnavailable
from cffa_core.jobs.database import Database
from cffa_core.jobs.spec import TrainingSpec
from cffa_core.jobs.store import JobStore
from tests.record_cases import OWNER, add_dataset, claimed, files, training_job
from tests.record_servers import PostgresRecords


@pytest.fixture
def url(postgres_records: PostgresRecords) -> Iterator[str]:
    made = postgres_records.new()
    yield made
    postgres_records.drop(made)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    opened = Database(url, application="cffa-test")
    opened.write(lambda connection: connection.exec_driver_sql("INSERT INTO owners VALUES ('a', 0), ('b', 0)"))
    yield opened
    opened.close()


def run(connection: sa.Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("statement_timeout", "30s"),
        ("lock_timeout", "10s"),
        ("idle_in_transaction_session_timeout", "30s"),
        ("application_name", "cffa-test"),
        ("transaction_isolation", "read committed"),
        ("tcp_keepalives_idle", "10"),
    ],
)
def test_connections_have_limits_and_a_name(database: Database, name: str, value: str) -> None:
    assert database.write(lambda connection: connection.exec_driver_sql(f"SHOW {name}").scalar_one()) == value


def test_reads_are_one_view_and_cannot_write(database: Database) -> None:
    shown = database.read(lambda connection: connection.exec_driver_sql("SHOW transaction_isolation").scalar_one())
    assert shown == "repeatable read"
    with pytest.raises(StorageUnavailable, match="read-only"):
        database.read(lambda connection: run(connection, "DELETE FROM owners"))
    # The connection goes back to the pool as one that writes.
    database.write(lambda connection: run(connection, "DELETE FROM owners"))


def test_a_lock_is_not_waited_for_for_ever(database: Database) -> None:
    def wait(connection: sa.Connection) -> None:
        run(connection, "SET LOCAL lock_timeout = '50ms'")
        run(connection, "SELECT owner FROM owners FOR UPDATE")

    def hold(connection: sa.Connection) -> None:
        run(connection, "SELECT owner FROM owners FOR UPDATE")
        with pytest.raises(StorageUnavailable, match="lock timeout"):
            database.write(wait)

    database.write(hold)


def test_deadlocked_transactions_both_come_through(database: Database) -> None:
    both_hold_one = threading.Barrier(2)
    runs: list[str] = []

    def cross(connection: sa.Connection, first: str, second: str) -> None:
        runs.append(first)
        run(connection, f"UPDATE owners SET served_turn = served_turn + 1 WHERE owner = '{first}'")
        if len(runs) <= 2:
            both_hold_one.wait(timeout=30)
        run(connection, f"UPDATE owners SET served_turn = served_turn + 1 WHERE owner = '{second}'")

    threads = [
        threading.Thread(target=database.write, args=(lambda connection, pair=pair: cross(connection, *pair),))
        for pair in (("a", "b"), ("b", "a"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 3
    turns = database.read(
        lambda connection: connection.exec_driver_sql("SELECT served_turn FROM owners").scalars().all()
    )
    assert turns == [2, 2]


def turns(connection: sa.Connection) -> list[int]:
    return list(connection.exec_driver_sql("SELECT served_turn FROM owners").scalars())


@pytest.mark.parametrize("state", ["40001", "40P01"])
def test_what_the_server_undid_is_repeated(database: Database, state: str) -> None:
    runs = 0

    def work(connection: sa.Connection) -> None:
        nonlocal runs
        runs += 1
        run(connection, "UPDATE owners SET served_turn = served_turn + 1")
        if runs < 3:
            run(connection, f"DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '{state}'; END $$")

    database.write(work)
    assert runs == 3
    assert database.read(turns) == [1, 1]


def test_a_lost_connection_is_replaced_and_the_transaction_repeated(database: Database) -> None:
    runs = 0

    def work(connection: sa.Connection) -> None:
        nonlocal runs
        runs += 1
        run(connection, "UPDATE owners SET served_turn = served_turn + 1")
        if runs == 1:
            run(connection, "SELECT pg_terminate_backend(pg_backend_pid())")

    database.write(work)
    assert runs == 2
    assert database.read(turns) == [1, 1]


def test_pooled_connections_that_died_are_not_handed_out(database: Database, url: str) -> None:
    database.read(lambda connection: run(connection, "SELECT 1"))
    other = Database(url)
    other.write(
        lambda connection: run(
            connection,
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
            " WHERE application_name = 'cffa-test' AND pid <> pg_backend_pid()",
        )
    )
    other.close()
    assert database.read(turns) == [0, 0]


def test_it_gives_up_on_what_never_works(database: Database) -> None:
    runs = 0

    def work(connection: sa.Connection) -> None:
        nonlocal runs
        runs += 1
        run(connection, "DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '40001'; END $$")

    with pytest.raises(StorageUnavailable):
        database.write(work)
    assert runs == 4


def test_a_server_that_is_not_there_is_a_typed_error_within_seconds(url: str) -> None:
    store = JobStore(sa.make_url(url).set(port=1).render_as_string(hide_password=False))
    begun = time.monotonic()
    for ask in (store.ping, store.migrate, lambda: store.take_turn("x", 1.0)):
        with pytest.raises(StorageUnavailable):
            ask()
    assert time.monotonic() - begun < 30.0
    store.close()


def test_a_wrong_password_is_a_typed_error_that_does_not_tell_it(url: str) -> None:
    store = JobStore(sa.make_url(url).set(password="not-the-password").render_as_string(hide_password=False))
    with pytest.raises(StorageUnavailable) as caught:
        store.ping()
    assert "not-the-password" not in caught.value.message
    store.close()


def test_what_the_database_cannot_store_is_refused_or_cleaned(url: str) -> None:
    store = JobStore(url)
    with pytest.raises(InvalidSpec):
        store.create_job(OWNER, TrainingSpec(dataset_id=add_dataset(store), cf_prompt="a\0b"))
    job = training_job(store)
    store.crashed(claimed(store), "died\0of \ud800", made_progress=False, detail="\0")
    assert store.get_job(OWNER, job.id).reason == "died\ufffdof ?"
    store.commit(claimed(store), files(), {"best": float("nan"), "all": [1.0, float("inf")]})
    assert store.parts(OWNER, job.id)[0].info == {"best": None, "all": [1.0, None]}
    store.close()
