"""A worker that is older than a job leaves it to newer ones, and says so; it goes on with what it knows."""

from __future__ import annotations

import logging

import pytest

from cffa_core.errors import VersionTooOld
from cffa_core.jobs.schema import jobs
from cffa_core.jobs.spec import SPEC_VERSION
from cffa_core.jobs.state import JobState
from tests.worker.scripted_child import Act
from tests.worker.world import OWNER, World, scripted


def test_jobs_of_a_newer_version_are_left_alone(world: World, caplog: pytest.LogCaptureFixture) -> None:
    dataset = world.add_unread_dataset()
    newer = world.training(dataset, seed=int(Act.FINISH))
    raised = jobs.update().where(jobs.c.id == newer.id)
    world.store._db.write(
        lambda c: c.execute(raised.values(spec_version=SPEC_VERSION + 1, spec={"kind": "unheard of"}))
    )
    known = world.training(dataset, seed=int(Act.FINISH))
    with caplog.at_level(logging.WARNING, "cffa.worker"), world.worker_thread(scripted()):
        assert world.wait_terminal(known.id).state is JobState.SUCCEEDED
        world.wait(lambda: world.store.list_workers()[0].info["refuses"], 10, "the worker saying so")
        (worker,) = world.store.list_workers()
        assert worker.info["spec_version"] == SPEC_VERSION
        assert f"spec version {SPEC_VERSION + 1}" in worker.info["refuses"]
    assert f"1 waiting jobs are left to newer workers: spec version {SPEC_VERSION + 1}" in caplog.text
    assert "no claim" not in caplog.text
    (state,) = world.store._db.read(lambda c: c.execute(jobs.select().where(jobs.c.id == newer.id)).all())
    assert (state.state, state.last_seq) == ("queued", 1), "nobody touched it"
    with pytest.raises(VersionTooOld, match="replace it"):
        world.store.get_job(OWNER, newer.id)
