"""Redis loses everything (FLUSHALL), is killed or restarted while jobs are worked on and posted.

No job is lost, nothing is done twice, and what was posted while Redis was away starts within 30 s of its return,
although the workers look for work by themselves only every ten minutes.
"""

from __future__ import annotations

import contextlib
import random
import time

from cffa_core.jobs.spec import Kind
from services.worker.outbox import BROKER_ERRORS
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.timed_child import read_log, timed, worked_on_twice
from tests.faults.worlds import FaultCluster
from tests.servers import Server

WORKERS = 2
JOBS = 3
PARTS = 4
PART_SECONDS = 0.4
START_SECONDS = 30.0


def scenario(seed: int, place: Place) -> Facts:
    """One loss at a random moment of three jobs; a fourth is posted meanwhile."""
    dice = random.Random(seed)
    redis = place.server("redis")
    with place.cluster(lease_seconds=6.0, sweep_seconds=1.0) as world:
        log = world.settings.home / "child.log"
        model_id = world.adopt_model()
        for _ in range(WORKERS):
            world.start_worker(timed(log, PART_SECONDS, local=True))
        world.wait_listening(WORKERS)
        jobs = [_post(world, model_id) for _ in range(JOBS)]
        world.wait(lambda: read_log(log), 60, "a child at work")
        time.sleep(dice.uniform(0.0, JOBS * PARTS * PART_SECONDS / WORKERS))
        how = ("flush", "kill", "restart")[seed % 3]
        jobs.append(lose(world, redis, how, dice, model_id))
        recovered = time.monotonic()
        world.wait(lambda: world.events(jobs[-1], "claimed"), 60, "the job that was posted meanwhile")
        waited = time.monotonic() - recovered
        for job_id in jobs:
            world.wait_terminal(job_id)
            world.assert_succeeded(job_id)
            assert set(world.attempts(job_id)) == {1}
        assert worked_on_twice(read_log(log)) == []
        assert waited < START_SECONDS, f"a queued job waited {waited:.1f} s after Redis was back"
        return {"start_seconds": waited, "how": how}


def lose(world: FaultCluster, redis: Server, how: str, dice: random.Random, model_id: str) -> str:
    """Make Redis forget, die or restart; returns the job that was posted while it was away."""
    if how == "flush":
        job_id = _post(world, model_id)
        world.redis.flushall()
        return job_id
    redis.kill() if how == "kill" else redis.stop()
    job_id = _post(world, model_id)
    time.sleep(dice.uniform(0.0, 3.0))
    redis.start()
    return job_id


def _post(world: FaultCluster, model_id: str) -> str:
    """As the API does: the job is committed first; a broker that is away does not matter."""
    job = world.generation(model_id, count=PARTS, part_size=1)
    with contextlib.suppress(*BROKER_ERRORS):
        world.announce(Kind.GENERATION, WORKERS)
    return job.id


FAULT = Fault("redis_loss", "FLUSHALL, kill or restart of Redis mid-run", 50, scenario, quick=(1,), servers=True)
