"""Kill -9 of a worker's child, or of the whole worker, at seeded moments of one job; shared by the two kill faults."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Job
from cffa_core.jobs.state import TERMINAL
from cffa_core.recipes.train import run_training
from cffa_core.storage.manifest import fetch_files
from tests.faults.place import Place
from tests.faults.worlds import FaultWorld
from tests.worker.world import OWNER, child_pids

KILLS = 3
LEASE = 6.0
PATIENCE = 240.0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """References are computed in this process with as many threads as the workers use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def world_for(seed: int, place: Place) -> AbstractContextManager[FaultWorld]:
    """Where the killing happens: every fourth seed on a whole cluster, the others on SQLite and a folder."""
    if seed % 4 == 0:
        return place.whole_cluster(lease_seconds=LEASE, poll_seconds=1.0)
    return place.world(lease_seconds=LEASE)


def kill_at_random(
    world: FaultWorld,
    job: Job,
    dice: random.Random,
    mark: Callable[[], int],
    last: int,
    on_kill: Callable[[], None] = lambda: None,
) -> int:
    """Run ``job`` to its end with a worker that is restarted when killed; returns how many kills it took.

    They are fewer than :data:`KILLS` if the job ended before the last of them, as it may on a busy machine.

    A kill comes a random moment after ``mark()``, what the record counts as done, has passed a random value below
    ``last``; ``on_kill`` is called after each. At least one kill is of the child alone and one of the worker.
    """
    targets = ["child", "worker", dice.choice(["child", "worker"])]
    dice.shuffle(targets)
    points = sorted(dice.sample(range(1, last), KILLS))
    worker, done = world.start_worker(), 0
    for target, point in zip(targets, points, strict=True):
        world.wait(lambda point=point: mark() >= point or over(world, job), PATIENCE, f"mark {point}")
        time.sleep(dice.uniform(0, 0.1))
        # After a kill of the worker the next child needs a while; a kill that hits nobody would be none.
        world.wait(lambda worker=worker: bool(child_pids(worker.pid)) or over(world, job), PATIENCE, "a child")
        if over(world, job):
            break
        victims = child_pids(worker.pid) if target == "child" else [worker.pid]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            done += 1
        if target == "worker":
            worker.wait()
        on_kill()
        if target == "worker":
            worker = world.start_worker()
    world.wait_terminal(job.id, PATIENCE)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0, world.logs()
    return done


def over(world: FaultWorld, job: Job) -> bool:
    """Whether the job has ended."""
    return world.job(job.id).state in TERMINAL


def train_directly(world: FaultWorld, job: Job, out: Path) -> dict[str, object]:
    """Run a training job's spec in this process, without service or interruption, into ``out``; returns the card."""
    folder = out.with_name(f"{out.name}-dataset")
    fetch_files(world.objects, world.store.get_dataset(OWNER, job.spec.dataset_id).stored, folder)
    context = FolderContext(out.with_name(f"{out.name}-context"))
    with one_thread():
        return run_training(job.spec.settings(), folder, "micro", out, context, models_dir=world.settings.models_dir)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_nothing_unrecorded(world: FaultWorld, job: Job) -> None:
    """What killed attempts stored and never committed is gone; what the record points to is there."""
    recorded = [part.stored for part in world.store.parts(OWNER, job.id)]
    recorded += [saved.stored for saved in world.store.checkpoints(OWNER, job.id)]
    keys = {info.key for stored in recorded for info in stored.files.values()}
    assert set(world.objects.list(f"jobs/{job.id}/")) == keys
