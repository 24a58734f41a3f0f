"""Worker clocks are five minutes fast or slow: leases live by the database's clock, so nothing is worked on twice.

Units last longer than their lease, so that it is renewed, and for every second seed a worker is killed, so that a
lease really expires and is freed by workers who believe in another time.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.timed_child import Line, read_log, timed, worked_on_twice
from tests.faults.worlds import ROOT
from tests.worker.world import OWNER, child_pids

LEASE = 4.0
PART_SECONDS = 1.5 * LEASE
PARTS = 4
SKEWS = (-300, 0, 300)
BENT_CLOCK = Path(__file__).with_name("bent_clock")


def scenario(seed: int, place: Place) -> Facts:
    """Three workers with three clocks on one PostgreSQL."""
    dice = random.Random(seed)
    with place.postgres_world(lease_seconds=LEASE) as world:
        log = world.settings.home / "child.log"
        job = world.generation(world.adopt_model(), count=PARTS, part_size=1)
        workers = {
            skew: world.start_worker(timed(log, PART_SECONDS), bent(skew)) for skew in dice.sample(SKEWS, len(SKEWS))
        }
        world.wait(
            lambda: {_skew(line) for line in read_log(log)} == set(SKEWS), 90, "three children with three clocks"
        )
        killed = 0
        if seed % 2 == 0:
            victim = workers[dice.choice([-300, 300])]
            killed = len(child_pids(victim.pid))
            victim.kill()
            victim.wait()
        world.wait_terminal(job.id)
        world.assert_succeeded(job.id)
        lost = world.events(job.id, "worker_lost")
        assert len(lost) <= killed, f"leases of living workers were taken for expired: {lost}"
        if not killed:
            assert worked_on_twice(read_log(log)) == []
        began = [line for line in read_log(log) if line.what == "began" and line.kind == "part"]
        assert len(began) <= PARTS + killed
        assert {part.attempt for part in world.store.parts(OWNER, job.id)} <= {1, 1 + killed}
        return {"killed": killed}


def bent(seconds: int) -> dict[str, str]:
    """Environment of a Python process whose wall clock is off."""
    return {"PYTHONPATH": f"{BENT_CLOCK}{os.pathsep}{ROOT}", "BENT_CLOCK_SECONDS": str(seconds)}


def _skew(line: Line) -> int:
    """By how much the wall clock of the child that wrote a line was off, rounded to minutes."""
    written = time.time() - (time.monotonic() - line.at)
    return round((line.wall - written) / 60) * 60


FAULT = Fault("clock_skew", "worker clocks off by five minutes", 20, scenario, quick=(2,), servers=True)
