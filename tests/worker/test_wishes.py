"""A training that is asked for something while it runs, from the record to the recipe and back."""

from __future__ import annotations

import io

from PIL import Image

from cffa_core.jobs.state import JobState
from tests.worker.world import OWNER, World

STEPS = 4000
EVER = {"steps": STEPS, "checkpoint_every": STEPS, "preview_every": STEPS, "validate_every": STEPS}


def test_a_running_training_does_what_it_is_asked_for(world: World) -> None:
    job = world.training(world.add_dataset(), **EVER)
    with world.worker_thread():
        world.wait(lambda: world.job(job.id).progress.stage == "training", 180, "the first step")
        world.store.ask(OWNER, job.id, "checkpoint")
        world.store.ask(OWNER, job.id, "sample")
        world.wait(lambda: not world.job(job.id).wishes, 180, "the end of the wishes")
        assert world.job(job.id).state is JobState.RUNNING
        world.store.cancel_job(OWNER, job.id)
        world.wait_terminal(job.id)
    fulfilled = [wish for data in world.events(job.id, "checkpoint") for wish in data["fulfilled"]]
    assert sorted(fulfilled) == ["checkpoint", "sample"]
    last = world.store.checkpoints(OWNER, job.id)[-1]
    assert 0 < last.step < STEPS
    sheet = world.objects.get_bytes(last.stored.files["sample/sheet.png"].key)
    assert Image.open(io.BytesIO(sheet)).size[1] == 160
