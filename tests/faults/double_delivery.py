"""Every message is in the queue ten times, with the same identity, and eight workers take them.

Each unit must be begun once, under its first attempt, whatever the messages say; and the queue must drain.
"""

from __future__ import annotations

import random

from cffa_core.jobs.delivery import queue_of
from cffa_core.jobs.spec import Kind
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.timed_child import read_log, timed, worked_on_twice
from tests.faults.worlds import FaultCluster

WORKERS = 8
COPIES = 10
PARTS = 16
PART_SECONDS = 0.5


def scenario(seed: int, place: Place) -> Facts:
    """Sixteen parts of two jobs, on SQLite or (every second seed) PostgreSQL."""
    dice = random.Random(seed)
    place.server("redis")
    with place.cluster(postgres=seed % 2 == 0, lease_seconds=8.0) as world:
        log = world.settings.home / "child.log"
        model_id = world.adopt_model()
        jobs = [world.generation(model_id, count=PARTS // 2, part_size=1).id for _ in range(2)]
        world.announce(Kind.GENERATION, PARTS)
        delivered = _copy_messages(world, COPIES - 1, dice)
        assert delivered == PARTS * COPIES
        for _ in range(WORKERS):
            world.start_worker(timed(log, PART_SECONDS, local=True))
        for job_id in jobs:
            world.wait_terminal(job_id, 180.0)
            world.assert_succeeded(job_id)
            assert set(world.attempts(job_id)) == {1}, "a unit was claimed twice"
            assert len(world.attempts(job_id)) == PARTS // 2 + 1
        lines = read_log(log)
        assert worked_on_twice(lines) == []
        began = [line.unit for line in lines if line.what == "began"]
        assert len(began) == len(set(began)) == PARTS + 2
        world.wait(lambda: world.queued(Kind.GENERATION) == 0, 60, "the queue to drain")
        return {"messages": delivered, "children": len({line.pid for line in lines})}


def _copy_messages(world: FaultCluster, copies: int, dice: random.Random) -> int:
    """Put each message of the queue into it again, with the same id and tag, in random order; returns how many."""
    queue = queue_of(Kind.GENERATION)
    messages = world.redis.lrange(queue, 0, -1)
    again = [message for message in messages for _ in range(copies)]
    dice.shuffle(again)
    world.redis.rpush(queue, *again)
    return int(world.redis.llen(queue))


FAULT = Fault(
    "double_delivery", "every message delivered 10 times to 8 workers", 20, scenario, quick=(1,), servers=True
)
