"""Several processes on one record: nothing is claimed twice, nothing acknowledged is lost when one is killed."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from tests.record_cases import OTHER, OWNER, generation_job, memory_folder, sqlite_store, trained_model
from tests.record_processes import Processes, processes


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def forks(folder: Path) -> Iterator[Processes]:
    with processes(folder) as started:
        yield started


def test_processes_that_start_together_migrate_once(folder: Path, forks: Processes) -> None:
    url = f"sqlite:///{folder / 'new' / 'home' / 'record.sqlite'}"
    started = [forks.start("migrate", url) for _ in range(4)]
    assert forks.finish(started) == [["migrated"]] * 4
    store = JobStore(url)
    assert len(store.list_workers()) == 4
    store.close()


def test_no_unit_is_claimed_twice_by_processes(folder: Path, forks: Processes) -> None:
    store = sqlite_store(folder)
    models = {owner: trained_model(store, owner) for owner in (OWNER, OTHER)}
    jobs = [generation_job(store, models[owner], owner, parts=10) for owner in (OWNER, OTHER) for _ in range(2)]
    url = f"sqlite:///{folder / 'record.sqlite'}"
    logs = forks.finish([forks.start("work", url) for _ in range(4)])
    claims = Counter(line for log in logs for line in log if line.startswith("claimed"))
    assert sorted(Counter(line.split()[3] for line in claims).items()) == [("finalize", 4), ("part", 40)]
    assert set(claims.values()) == {1}
    assert {line.split()[2] for line in claims} == {"1"}
    for job in jobs:
        found = store.get_job(job.owner, job.id)
        assert (found.state, found.counts.generated) == (JobState.SUCCEEDED, 40)
    store.close()


def test_a_killed_process_loses_nothing_it_had_acknowledged(folder: Path, forks: Processes) -> None:
    store = sqlite_store(folder)
    for owner in (OWNER, OTHER):
        trained_model(store, owner)
    dice = random.Random(20261121)
    acknowledged: list[str] = []
    for _ in range(20):
        started = forks.start("live", f"sqlite:///{folder / 'record.sqlite'}")
        acknowledged += forks.kill_while_busy(started, after_lines=dice.randint(1, 6), extra=dice)
        with sqlite3.connect(folder / "record.sqlite") as raw:
            assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
            units = dict(raw.execute("SELECT job_id || ' ' || idx, state FROM units WHERE kind = 'part'"))
            jobs = {found for (found,) in raw.execute("SELECT id FROM jobs")}
        raw.close()
        for line in acknowledged:
            what, rest = line.split(" ", 1)
            assert rest in jobs if what == "created" else units[rest] == "done"
        # A job is there whole or not at all: two parts each, and the event of its creation.
        assert len(units) == 2 * (len(jobs) - 2)
    assert len(acknowledged) > 40
    store.close()
