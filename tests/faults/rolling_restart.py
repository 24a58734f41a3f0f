"""Workers are replaced one after the other with SIGTERM while jobs are posted and worked on.

No unit is crashed or lost, nothing fails, every worker ends with 0, and what it gave back is done by another.
"""

from __future__ import annotations

import random
import signal
import time

from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.timed_child import read_log, timed, worked_on_twice
from tests.faults.worlds import FaultWorld

WORKERS = 3
JOBS = 4
PART_SECONDS = 0.6


def scenario(seed: int, place: Place) -> Facts:
    """Workers that poll, or (every second seed) Celery workers that only messages wake.

    With a lease of six seconds no busy machine makes them look lost.
    """
    dice = random.Random(seed)
    if seed % 2:
        with place.world(lease_seconds=6.0) as world:
            return _restart_all(world, dice, local=False)
    place.server("redis")
    with place.cluster(lease_seconds=6.0, sweep_seconds=1.0) as cluster:
        return _restart_all(cluster, dice, local=True)


def _restart_all(world: FaultWorld, dice: random.Random, *, local: bool) -> Facts:
    """Replace every worker of ``world`` under load; in a cluster the workers' own top-up sends the messages."""
    log = world.settings.home / "child.log"
    command = timed(log, PART_SECONDS, local=local)
    model_id = world.adopt_model()
    jobs = [_post(world, model_id) for _ in range(JOBS)]
    workers = [world.start_worker(command) for _ in range(WORKERS)]
    world.wait(lambda: {line.pid for line in read_log(log)}, 60, "a child at work")
    for number in range(WORKERS):
        time.sleep(dice.uniform(0.0, 2 * PART_SECONDS))
        jobs.append(_post(world, model_id))
        fresh = world.start_worker(command)
        workers[number].send_signal(signal.SIGTERM)
        assert workers[number].wait(60) == 0, world.logs()
        workers[number] = fresh
    released = 0
    for job_id in jobs:
        world.wait_terminal(job_id)
        world.assert_succeeded(job_id)
        assert world.events(job_id, "crashed") + world.events(job_id, "worker_lost") == []
        claims, given_back = (len(world.events(job_id, kind)) for kind in ("claimed", "released"))
        assert claims == given_back + len(world.store.parts("local", job_id))
        released += given_back
    for worker in workers:
        worker.send_signal(signal.SIGTERM)
    assert [worker.wait(60) for worker in workers] == [0] * WORKERS
    assert worked_on_twice(read_log(log)) == []
    assert world.store.list_workers() == []
    return {"released": released}


def _post(world: FaultWorld, model_id: str) -> str:
    return world.generation(model_id, count=6, part_size=2).id


FAULT = Fault("rolling_restart", "SIGTERM rolling restart under load", 20, scenario, quick=(2,), servers=True)
