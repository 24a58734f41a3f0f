"""SIGSTOP of a worker for two leases, then SIGCONT: what it writes after waking must touch no row.

By then the unit has been done by another worker; the published artefact is the newest attempt's, and the record is
the same before and after the sleeper wakes.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import time
from typing import Any

from cffa_core.jobs.state import JobState
from tests.faults.campaign import Facts, Fault
from tests.faults.place import LEASE, Place
from tests.faults.timed_child import read_log, timed
from tests.faults.worlds import FaultWorld
from tests.worker.world import OWNER, child_pids

SECONDS = 2.5


def scenario(seed: int, place: Place) -> Facts:
    """One sleeper, alone or together with its child; on PostgreSQL for every second seed."""
    dice = random.Random(seed)
    with place.world() if seed % 2 else place.postgres_world() as world:
        return _sleep_and_wake(world, dice, together=dice.random() < 0.5)


def _sleep_and_wake(world: FaultWorld, dice: random.Random, *, together: bool) -> Facts:
    log = world.settings.home / "child.log"
    job = world.generation(world.adopt_model(), count=1)
    sleeper = world.start_worker(timed(log, SECONDS))
    world.wait(lambda: read_log(log), 60, "a child at work")
    time.sleep(dice.uniform(0.0, 0.5 * SECONDS))
    pids = [sleeper.pid, *(child_pids(sleeper.pid) if together else [])]
    _put_to_sleep(world, pids)
    asleep = time.monotonic()
    if world.job(job.id).state is not JobState.RUNNING:  # it was faster than the dice
        _signal(pids, signal.SIGCONT)
        world.wait_terminal(job.id)
        return {"points": 0}
    other = world.start_worker(timed(log, 0.2))
    finished = world.wait_terminal(job.id)
    assert finished.state is JobState.SUCCEEDED
    time.sleep(max(0.0, asleep + 2 * LEASE - time.monotonic()))
    before = _everything(world, job.id)
    _signal(pids, signal.SIGCONT)
    # The sleeper must notice and go on as a worker like any other.
    other.send_signal(signal.SIGTERM)
    assert other.wait(30) == 0
    second = world.generation(world.store.list_models(OWNER).items[0].id, count=1)
    world.wait_terminal(second.id)
    world.assert_succeeded(second.id)
    assert _everything(world, job.id) == before, "a worker that had lost its lease changed the record"
    assert sleeper.poll() is None
    claims = world.events(job.id, "claimed")
    for part in world.store.parts(OWNER, job.id):
        newest = max(c["attempt"] for c in claims if (c["unit"], c["index"]) == (part.kind.value, part.index))
        assert part.attempt == newest
        for info in part.stored.files.values():
            assert f"/a{newest}/" in info.key
            assert world.objects.get_bytes(info.key).split()[0] == str(newest).encode()
    assert any(part.attempt > 1 for part in world.store.parts(OWNER, job.id))
    return {"points": 1}


def _everything(world: FaultWorld, job_id: str) -> tuple[Any, ...]:
    return world.job(job_id), world.store.parts(OWNER, job_id), world.store.events(OWNER, job_id, limit=1000)


def _put_to_sleep(world: FaultWorld, pids: list[int]) -> None:
    """Stop processes; on SQLite at a moment at which none holds the one write lock, which would stop everybody."""
    for _ in range(200):
        _signal(pids, signal.SIGSTOP)
        if world.settings.database_url or _writable(world):
            return
        _signal(pids, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("the worker never let go of the record")


def _signal(pids: list[int], number: signal.Signals) -> None:
    """Send a signal to those that still live: a child may have done its work."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _writable(world: FaultWorld) -> bool:
    probe = sqlite3.connect(world.settings.home / "record.sqlite", isolation_level=None, timeout=0.2)
    try:
        probe.execute("BEGIN IMMEDIATE")
        probe.execute("ROLLBACK")
    except sqlite3.OperationalError:
        return False
    finally:
        probe.close()
    return True


FAULT = Fault("sleeping_worker", "SIGSTOP for two leases, then SIGCONT", 50, scenario, quick=(1, 2), servers=True)
