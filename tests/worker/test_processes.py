"""A worker as a process among others: shutdown, sudden death, and waking up after its lease went to another."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from pathlib import Path

from cffa_core.jobs.state import JobState, UnitKind
from tests.worker.scripted_child import Act
from tests.worker.world import OWNER, World, child_pids, scripted


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def put_to_sleep(world: World, pid: int) -> None:
    """Stop a process at a moment at which it does not hold SQLite's one write lock: that would stop everybody."""
    for _ in range(100):
        os.kill(pid, signal.SIGSTOP)
        probe = sqlite3.connect(world.settings.home / "record.sqlite", isolation_level=None, timeout=0.2)
        try:
            probe.execute("BEGIN IMMEDIATE")
            probe.execute("ROLLBACK")
            return
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.05)
        finally:
            probe.close()
    raise AssertionError("the worker never let go of the record")


def test_sigterm_gives_the_unit_back_without_penalty_and_ends_with_0(world: World) -> None:
    job = world.training(world.add_unread_dataset(), seed=int(Act.WAIT_FOR_STOP))
    worker = world.start_worker(scripted())
    world.wait(lambda: world.job(job.id).progress.current > 0)
    assert len(world.store.list_workers()) == 1
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(8) == 0
    assert world.job(job.id).state is JobState.QUEUED
    assert len(world.events(job.id, "released")) == 1
    assert world.events(job.id, "crashed") + world.events(job.id, "worker_lost") == []
    assert world.store.list_workers() == []
    assert list((world.settings.scratch_dir / "workers").iterdir()) == []


def test_an_idle_worker_ends_at_sigterm(world: World) -> None:
    worker = world.start_worker(scripted())
    world.wait(world.store.list_workers)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(5) == 0


def test_a_killed_worker_takes_its_child_along_and_another_goes_on(short_leases: World) -> None:
    world = short_leases
    job = world.training(world.add_unread_dataset(), seed=int(Act.SLOW_FIRST_ATTEMPT))
    worker = world.start_worker(scripted())
    world.wait(lambda: world.job(job.id).progress.current > 0)
    (child,) = child_pids(worker.pid)
    worker.kill()
    worker.wait()
    world.wait(lambda: not alive(child), 2)
    (left,) = (world.settings.scratch_dir / "workers").iterdir()
    with world.worker_thread(scripted()):
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
        assert not left.exists()
    assert world.events(job.id, "worker_lost")
    (part,) = world.store.parts(OWNER, job.id, kind=UnitKind.TRAIN)
    assert part.attempt >= 2


def test_a_worker_that_slept_through_its_lease_writes_nothing(short_leases: World) -> None:
    world = short_leases
    job = world.training(world.add_unread_dataset(), seed=int(Act.SLOW_FIRST_ATTEMPT))
    sleeper = world.start_worker(scripted())
    world.wait(lambda: world.job(job.id).progress.current > 0)
    put_to_sleep(world, sleeper.pid)
    with world.worker_thread(scripted()):
        finished = world.wait_terminal(job.id)
    assert finished.state is JobState.SUCCEEDED
    before = (world.job(job.id), world.store.parts(OWNER, job.id), world.store.events(OWNER, job.id))
    # By now its child has stored its products and reported them; only the record keeps them out.
    world.wait(lambda: any("/train/a1/" in key for key in world.objects.list(f"jobs/{job.id}/")), 10)
    sleeper.send_signal(signal.SIGCONT)
    other = world.training(world.add_unread_dataset(), seed=int(Act.FINISH))
    assert world.wait_terminal(other.id).state is JobState.SUCCEEDED
    assert (world.job(job.id), world.store.parts(OWNER, job.id), world.store.events(OWNER, job.id)) == before
    assert before[1][0].attempt >= 2
    assert sleeper.poll() is None


def test_two_workers_share_the_parts_of_a_job(world: World) -> None:
    with world.worker_thread(scripted()), world.worker_thread(scripted()):
        trained = world.wait_terminal(world.training(world.add_unread_dataset(), seed=int(Act.FINISH)).id)
        job = world.wait_terminal(world.generation(trained.result["model_id"], count=40, seed=int(Act.FINISH)).id)
    assert job.state is JobState.SUCCEEDED
    claimed = world.events(job.id, "claimed")
    assert len(claimed) == 21
    assert {claim["attempt"] for claim in claimed} == {1}
    assert len({claim["worker"] for claim in claimed}) == 2


def test_waking_finds_work_before_the_next_poll(tmp_path: Path, models_dir: Path) -> None:
    world = World(tmp_path / "home", models_dir, poll_seconds=60.0)
    try:
        dataset = world.add_unread_dataset()
        with world.worker_thread(scripted()) as worker:
            world.wait(world.store.list_workers)
            time.sleep(0.3)
            job = world.training(dataset, seed=int(Act.FINISH))
            worker.wake()
            assert world.wait_terminal(job.id, 10).state is JobState.SUCCEEDED
    finally:
        world.close()


def test_children_do_not_share_the_terminals_process_group(world: World) -> None:
    job = world.training(world.add_unread_dataset(), seed=int(Act.WAIT_FOR_STOP))
    worker = world.start_worker(scripted())
    world.wait(lambda: world.job(job.id).progress.current > 0)
    (child,) = child_pids(worker.pid)
    assert os.getpgid(child) != os.getpgid(worker.pid)
