"""Redis is restarted, killed or flushed while all workers are idle: none of them may stay deaf.

As many jobs as workers are posted afterwards, each of which occupies its worker, so that each must have heard. Jobs
must start within 30 s, the last worker must be at work within 60 s. A worker that gives itself up is started again, as
compose, Kubernetes and ``cffa serve`` do.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import time

from cffa_core.jobs.spec import Kind
from services.worker.cluster import EXIT_DEAF
from services.worker.outbox import BROKER_ERRORS
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.timed_child import read_log, timed
from tests.faults.worlds import FaultCluster

WORKERS = 3
OCCUPIED_SECONDS = 4.0
FIRST_SECONDS = 30.0
DEAF_SECONDS = 60.0


def scenario(seed: int, place: Place) -> Facts:
    """One outage of up to five seconds."""
    dice = random.Random(seed)
    redis = place.server("redis")
    with place.cluster(lease_seconds=6.0, sweep_seconds=1.0) as world:
        log = world.settings.home / "child.log"
        model_id = world.adopt_model()
        command = timed(log, OCCUPIED_SECONDS, local=True)
        workers = [world.start_worker(command) for _ in range(WORKERS)]
        world.wait_listening(WORKERS)
        how = ("restart", "kill", "flush", "drop connections")[seed % 4]
        if how == "flush":
            world.redis.flushall()
        elif how == "drop connections":
            world.redis.client_kill_filter(_type="normal", skipme=True)
            world.redis.client_kill_filter(_type="pubsub", skipme=True)
        else:
            redis.stop() if how == "restart" else redis.kill()
            time.sleep(dice.uniform(0.0, 5.0))
            redis.start()
        recovered = time.monotonic()
        jobs = [world.generation(model_id, count=1).id for _ in range(WORKERS)]
        with contextlib.suppress(*BROKER_ERRORS):
            world.announce(Kind.GENERATION, dice.choice([0, 1, WORKERS]))

        def begun() -> set[int]:
            _restart_deaf(world, workers, command)
            return {line.pid for line in read_log(log)}

        world.wait(begun, DEAF_SECONDS, "a queued job to start")
        first = time.monotonic() - recovered
        world.wait(lambda: len(begun()) >= WORKERS or _all_over(world, jobs), DEAF_SECONDS, "all workers at work")
        all_at_work = time.monotonic() - recovered
        for job_id in jobs:
            world.wait_terminal(job_id)
            world.assert_succeeded(job_id)
        world.wait_listening(WORKERS, DEAF_SECONDS)
        assert first < FIRST_SECONDS, f"the first queued job waited {first:.1f} s"
        assert all_at_work < DEAF_SECONDS
        return {"start_seconds": first, "all_at_work_seconds": all_at_work, "how": how}


def _restart_deaf(world: FaultCluster, workers: list[subprocess.Popen[bytes]], command: list[str]) -> None:
    for number, worker in enumerate(workers):
        code = worker.poll()
        if code is not None:
            assert code == EXIT_DEAF, f"a worker ended with {code}\n{world.logs()}"
            workers[number] = world.start_worker(command)


def _all_over(world: FaultCluster, jobs: list[str]) -> bool:
    """On a busy machine one worker may have done two jobs before the last one was started."""
    return all(world.job(job_id).result is not None for job_id in jobs)


FAULT = Fault("redis_idle", "Redis restart with idle workers", 50, scenario, quick=(1,), servers=True)
