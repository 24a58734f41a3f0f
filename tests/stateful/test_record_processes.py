"""Several processes on one record: nothing is claimed twice, nothing acknowledged is lost when one is killed, locks are
taken in one order, and what one process at a time may do, one does."""

from __future__ import annotations

import itertools
import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from cffa_core.jobs.database import Database
from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from tests.record_cases import OTHER, OWNER, generation_job, memory_folder, trained_model
from tests.record_processes import ACTS, CAP, ENDURED_JOBS, TURN_SECONDS, Processes, processes
from tests.record_servers import PostgresRecords, Records, SqliteRecords
from tests.servers import running


@pytest.fixture
def forks() -> Iterator[Processes]:
    with memory_folder() as folder, processes(folder) as started:
        yield started


def models_of_both(store: JobStore) -> None:
    for owner in (OWNER, OTHER):
        trained_model(store, owner)


@pytest.fixture
def url(records: Records) -> Iterator[str]:
    made = records.new(models_of_both)
    yield made
    records.drop(made)


def ask(url: str, statement: str) -> list[tuple[object, ...]]:
    database = Database(url)
    rows = database.read(lambda connection: connection.exec_driver_sql(statement).all())
    database.close()
    return [tuple(row) for row in rows]


def test_processes_that_start_together_migrate_once(records: Records, forks: Processes) -> None:
    url = records.bare()
    started = [forks.start("migrate", url) for _ in range(4)]
    assert forks.finish(started) == [["migrated"]] * 4
    store = JobStore(url)
    assert len(store.list_workers()) == 4
    store.close()


def test_no_unit_is_claimed_twice_by_processes(url: str, forks: Processes) -> None:
    store = JobStore(url)
    models = {owner: store.list_models(owner).items[0].id for owner in (OWNER, OTHER)}
    jobs = [generation_job(store, models[owner], owner, parts=10) for owner in (OWNER, OTHER) for _ in range(2)]
    logs = forks.finish([forks.start("work", url) for _ in range(6)])
    claims = Counter(line for log in logs for line in log if line.startswith("claimed"))
    assert sorted(Counter(line.split()[3] for line in claims).items()) == [("finalize", 4), ("part", 40)]
    assert set(claims.values()) == {1}
    assert {line.split()[2] for line in claims} == {"1"}
    for job in jobs:
        found = store.get_job(job.owner, job.id)
        assert (found.state, found.counts.generated) == (JobState.SUCCEEDED, 40)
    store.close()


def test_a_killed_process_loses_nothing_it_had_acknowledged(records: Records, url: str, forks: Processes) -> None:
    dice = random.Random(20261121)
    acknowledged: list[str] = []
    for _ in range(20 if isinstance(records, SqliteRecords) else 8):
        started = forks.start("live", url)
        acknowledged += forks.kill_while_busy(started, after_lines=dice.randint(1, 6), extra=dice)
        if isinstance(records, SqliteRecords):
            check_file(Path(str(sa.make_url(url).database)))
        units = dict(ask(url, "SELECT job_id || ' ' || idx, state FROM units WHERE kind = 'part'"))
        jobs = {found for (found,) in ask(url, "SELECT id FROM jobs")}
        for line in acknowledged:
            what, rest = line.split(" ", 1)
            assert rest in jobs if what == "created" else units[rest] == "done"
        # A job is there whole or not at all: two parts each, beside the two training jobs.
        assert len(units) == 2 * (len(jobs) - 2)
    assert len(acknowledged) > 16


def check_file(path: Path) -> None:
    with sqlite3.connect(path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    raw.close()


def test_one_process_at_a_time_takes_a_turn(url: str, forks: Processes) -> None:
    logs = forks.finish([forks.start("turns", url) for _ in range(8)])
    taken = sorted(float(line.split()[1]) for log in logs for line in log)
    assert len(taken) >= 3
    # Told late on a busy machine, but never too early: the k-th turn comes k intervals after the first at the soonest.
    told_late = 0.25
    for number, at in enumerate(taken):
        assert at - taken[0] > number * TURN_SECONDS - told_late
    assert ask(url, "SELECT count(*) FROM turns") == [(1,)]


def test_no_owner_exceeds_the_cap_whoever_claims(url: str, forks: Processes) -> None:
    store = JobStore(url)
    models = {owner: store.list_models(owner).items[0].id for owner in (OWNER, OTHER)}
    jobs = {owner: generation_job(store, models[owner], owner, parts=12) for owner in (OWNER, OTHER)}
    forks.finish([forks.start("capped", url) for _ in range(8)])
    for owner, job in jobs.items():
        assert store.get_job(owner, job.id).counts.generated == 48
        changes = [
            (event.at, +1 if event.type == "claimed" else -1)
            for event in store.events(owner, job.id, limit=1000)
            if event.type in ("claimed", "committed") and event.data["unit"] == "part"
        ]
        assert len(changes) == 24
        at_a_time = list(itertools.accumulate(change for _, change in changes))
        assert max(at_a_time) <= CAP
    store.close()


def test_locks_are_taken_in_one_order(url: str, records: Records, forks: Processes) -> None:
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    postgres = isinstance(records, PostgresRecords)
    before = ask(url, deadlocks) if postgres else None
    logs = forks.finish([forks.start("quarrel", url) for _ in range(8)])
    acts = Counter(line for log in logs for line in log)
    assert set(acts) == set(ACTS)
    if postgres:
        assert ask(url, deadlocks) == before
    # What is counted while it changes agrees with a count of the rows.
    waiting = "SELECT count(*) FROM units WHERE units.job_id = jobs.id AND units.state = 'queued'"
    claimable = "state IN ('queued', 'running', 'finalizing')"
    assert ask(url, f"SELECT id FROM jobs WHERE waiting <> CASE WHEN {claimable} THEN ({waiting}) ELSE 0 END") == []


def test_a_killed_server_loses_nothing_that_was_acknowledged(forks: Processes) -> None:
    dice = random.Random(20261122)
    with running("postgres") as server:
        store = JobStore(server.url)
        store.migrate()
        models_of_both(store)
        store.close()
        started = [forks.start("endure", server.url) for _ in range(2)]
        for _ in range(2):
            wait = dice.uniform(0.2, 1.0)
            forks.wait_for_lines(started, 4, extra=wait)
            server.kill()
            server.start()
        logs = forks.finish(started)
        store = JobStore(server.url)
        jobs = [job for job in store.list_jobs(OWNER, page_size=1000).items if job.counts.requested]
        assert sorted(job.id for job in jobs) == sorted(
            line.split()[1] for log in logs for line in log if "created" in line
        )
        assert len(jobs) == 2 * ENDURED_JOBS
        assert {job.state for job in jobs} == {JobState.SUCCEEDED}
        # No claim was lost and made again: each unit went to one process once.
        claims = Counter(line for log in logs for line in log if line.startswith("claimed"))
        assert set(claims.values()) == {1}
        assert {line.split()[2] for line in claims} == {"1"}
        store.close()
