"""How units end: every way a child can behave, with the real record, storage and supervisor.

The child is a real process that follows a script instead of computing (``scripted_child``), so each test takes about
a second; the child that computes is tested in ``test_embedded`` and in ``tests/faults``.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cffa_core.jobs.records import Job
from cffa_core.jobs.state import JobState, UnitKind
from tests.worker.scripted_child import Act
from tests.worker.world import OWNER, World, scripted

Post = Callable[[Act], Job]


@pytest.fixture
def post(world: World) -> Post:
    """Post a training job that acts as told."""
    dataset = world.add_unread_dataset()

    def post(act: Act) -> Job:
        return world.training(dataset, seed=int(act))

    return post


def attempts(world: World, job: Job) -> int:
    """How often a unit of the job was claimed."""
    return len(world.events(job.id, "claimed"))


def test_one_child_serves_all_units_of_a_job_and_another_job_gets_another(world: World, post: Post) -> None:
    with world.worker_thread(scripted()):
        model_id = world.wait_terminal(post(Act.FINISH).id).result["model_id"]
        job = world.wait_terminal(world.generation(model_id, seed=int(Act.FINISH)).id)
    assert job.state is JobState.SUCCEEDED
    pids = {}
    for job_id in (job.id, world.store.get_model(OWNER, model_id).job_id):
        stored = [next(iter(part.stored.files.values())) for part in world.store.parts(OWNER, job_id)]
        pids[job_id] = {world.objects.get_bytes(info.key).split()[1] for info in stored}
    assert [len(found) for found in pids.values()] == [1, 1]
    assert len(set.union(*pids.values())) == 2


def test_progress_and_metrics_reach_the_record(world: World, post: Post) -> None:
    job = post(Act.WAIT_FOR_STOP)
    with world.worker_thread(scripted()):
        seen = world.wait(lambda: world.job(job.id).progress.current > 3 and world.job(job.id).progress)
        assert (seen.stage, seen.total) == ("waiting", 10_000)
        world.store.cancel_job(OWNER, job.id)
        world.wait_state(job.id, JobState.CANCELED, 5)
        finished = world.wait_terminal(post(Act.FINISH).id)
    assert world.store.metrics(OWNER, finished.id) == [(1, {"loss": 0.5})]


def test_a_poison_unit_fails_after_exactly_three_crashes_and_its_neighbours_succeed(world: World, post: Post) -> None:
    jobs = [post(Act.FINISH), post(Act.SEGFAULT), post(Act.FINISH)]
    with world.worker_thread(scripted()):
        before, poison, after = [world.wait_terminal(job.id) for job in jobs]
    assert [before.state, after.state] == [JobState.SUCCEEDED, JobState.SUCCEEDED]
    assert poison.state is JobState.FAILED
    assert poison.error is not None
    assert poison.error["code"] == "crashed"
    assert "SIGSEGV" in poison.error["message"]
    assert len(world.events(poison.id, "crashed")) == 3
    assert attempts(world, poison) == 3


def test_crashes_with_a_checkpoint_between_them_do_not_add_up(world: World, post: Post) -> None:
    job = post(Act.CHECKPOINT_THEN_SEGFAULT)
    with world.worker_thread(scripted()):
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    assert len(world.events(job.id, "crashed")) == 5
    assert len(world.store.checkpoints(OWNER, job.id)) == 3
    steps = [step for step, values in world.store.metrics(OWNER, job.id) if values != {"loss": 0.5}]
    assert steps == [2, 3, 4, 5], "metrics before a checkpoint outlive the crash after it; step 1 was written again"


def test_a_child_that_dies_before_it_is_ready_is_not_the_jobs_fault(world: World, post: Post) -> None:
    job = post(Act.DIE_UNPREPARED_ONCE)
    with world.worker_thread(scripted()):
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    assert world.events(job.id, "crashed") == []
    (released,) = world.events(job.id, "released")
    assert "exit code 3" in released["reason"]


def test_a_child_that_makes_no_step_is_killed_and_the_unit_done_again(tmp_path: Path, models_dir: Path) -> None:
    world = World(tmp_path / "home", models_dir, stall_seconds=3.0)
    try:
        job = world.training(world.add_unread_dataset(), seed=int(Act.STALL_ONCE))
        with world.worker_thread(scripted()):
            assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
        (crash,) = world.events(job.id, "crashed")
        assert "no step within 3 s" in crash["reason"]
    finally:
        world.close()


def test_a_child_that_says_something_else_is_ended(world: World, post: Post) -> None:
    job = post(Act.SPEAK_GARBAGE_ONCE)
    with world.worker_thread(scripted()):
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    (crash,) = world.events(job.id, "crashed")
    assert "hello" in crash["reason"]


def test_a_typed_error_fails_the_job_at_once(world: World, post: Post) -> None:
    job = post(Act.FAIL_TYPED)
    with world.worker_thread(scripted()):
        failed = world.wait_terminal(job.id)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert (failed.error["code"], failed.error["message"]) == ("invalid_dataset", "as told")
    assert attempts(world, job) == 1


def test_an_untyped_error_is_a_crash_whose_traceback_stays_in_the_history(world: World, post: Post) -> None:
    job = post(Act.FAIL_UNTYPED_ONCE)
    with world.worker_thread(scripted()):
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    (crash,) = world.events(job.id, "crashed")
    assert crash["reason"] == "as told"
    assert "line 2" in crash["detail"]


def test_a_retryable_error_leaves_the_job_waiting_with_the_reason_and_others_go_on(world: World, post: Post) -> None:
    job = post(Act.FAIL_RETRYABLE)
    with world.worker_thread(scripted()):
        world.wait(lambda: world.events(job.id, "released"), 10)
        assert world.wait_terminal(post(Act.FINISH).id).state is JobState.SUCCEEDED
        waiting = world.job(job.id)
    assert waiting.state is JobState.QUEUED
    assert waiting.reason == "storage_unavailable: as told"
    assert attempts(world, job) == 1


def test_a_job_bound_to_other_numerics_waits_for_a_worker_that_matches(world: World, post: Post) -> None:
    one, other = (f"cpu/{name}/torch-0/diffusers-0/fp32/threads-1/batch-1" for name in ("this", "that"))
    job = post(Act.CHECKPOINT_THEN_SEGFAULT)
    with world.worker_thread(scripted(one)):
        world.wait(lambda: world.store.checkpoints(OWNER, job.id), 10)
        world.store.pause_job(OWNER, job.id)
        world.wait_state(job.id, JobState.PAUSED)
    world.store.resume_job(OWNER, job.id)
    with world.worker_thread(scripted(other)):
        world.wait(lambda: (world.job(job.id).reason or "").startswith("numerics_mismatch"), 10)
        seen = attempts(world, job)
        time.sleep(1.0)
        assert attempts(world, job) == seen
        assert world.wait_terminal(post(Act.FINISH).id).state is JobState.SUCCEEDED
    with world.worker_thread(scripted(one)):
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    assert world.job(job.id).numerics_key == one


def test_pause_and_cancel_are_obeyed_at_the_next_step(world: World, post: Post) -> None:
    job = post(Act.WAIT_FOR_STOP)
    with world.worker_thread(scripted()):
        world.wait(lambda: world.job(job.id).progress.current > 0)
        world.store.pause_job(OWNER, job.id)
        world.wait_state(job.id, JobState.PAUSED, 5)
        world.store.resume_job(OWNER, job.id)
        world.wait(lambda: attempts(world, job) == 2)
        world.store.cancel_job(OWNER, job.id)
        world.wait_state(job.id, JobState.CANCELED, 5)
    assert world.events(job.id, "crashed") == []


def test_a_child_deaf_to_cancel_is_killed_after_the_grace_period(tmp_path: Path, models_dir: Path) -> None:
    world = World(tmp_path / "home", models_dir, cancel_grace_seconds=1.0)
    try:
        job = world.training(world.add_unread_dataset(), seed=int(Act.IGNORE_STOP))
        with world.worker_thread(scripted()):
            world.wait(lambda: world.job(job.id).progress.current > 0)
            world.store.cancel_job(OWNER, job.id)
            asked = time.monotonic()
            world.wait_state(job.id, JobState.CANCELED, 6)
            assert 1.0 < time.monotonic() - asked < 4.0
    finally:
        world.close()


def test_a_child_ends_when_the_record_is_away_for_too_long_and_the_unit_is_done_later(short_leases: World) -> None:
    world = short_leases
    job = world.training(world.add_unread_dataset(), seed=int(Act.SLOW_FIRST_ATTEMPT))
    with world.worker_thread(scripted()):
        world.wait(lambda: world.job(job.id).progress.current > 0)
        blocker = sqlite3.connect(world.settings.home / "record.sqlite", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        time.sleep(0.9 * world.settings.lease_seconds)
        blocker.execute("ROLLBACK")
        blocker.close()
        assert world.wait_terminal(job.id).state is JobState.SUCCEEDED
    (part,) = world.store.parts(OWNER, job.id, kind=UnitKind.TRAIN)
    assert part.attempt == 2
