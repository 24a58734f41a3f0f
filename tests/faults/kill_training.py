"""Kill -9 during training: at most one checkpoint interval is repeated, and the products are the same bytes.

The reference is the same spec run directly, in this process, without service, worker or interruption.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

from cffa_core.jobs.state import JobState, UnitKind
from tests.faults.campaign import Facts, Fault
from tests.faults.killing import assert_nothing_unrecorded, digests, kill_at_random, train_directly, world_for
from tests.faults.place import Place
from tests.faults.worlds import FaultWorld
from tests.worker.world import OWNER

STEPS = 150
EVERY = 5
SPECS = 4


def scenario(seed: int, place: Place) -> Facts:
    """Three kills in one training; there are four specs, whose references are computed once per process."""
    dice = random.Random(seed)
    with world_for(seed, place) as world:
        job = world.training(
            world.add_dataset(),
            steps=STEPS,
            checkpoint_every=EVERY,
            validate_every=25,
            preview_every=100,
            ema_decay=0.9,
            seed=seed % SPECS,
        )
        lost: list[int] = []

        def newest_checkpoint() -> int:
            return max((saved.step for saved in world.store.checkpoints(OWNER, job.id)), default=0)

        def look() -> None:
            logged = [step for step, _ in world.store.metrics(OWNER, job.id, key="loss")]
            lost.append(max(logged, default=0) - newest_checkpoint())

        kills = kill_at_random(world, job, dice, newest_checkpoint, STEPS // 2, look)
        world.assert_succeeded(job.id)
        assert kills > 0
        assert max(lost) <= EVERY, f"{lost} steps were lost at the kills"
        saved = [event["step"] for event in world.events(job.id, "checkpoint")]
        gaps = [after - before for before, after in pairwise([0, *saved])]
        assert all(0 < gap <= EVERY for gap in gaps), f"a run did not go on at the newest checkpoint: {saved}"
        _compare(world, job.id, _reference(place, world, job))
        assert len([claim for claim in world.events(job.id, "claimed") if claim["unit"] == "train"]) <= 1 + kills
        assert_nothing_unrecorded(world, job)
        return {"points": kills, "steps_lost": max(lost)}


def _reference(place: Place, world: FaultWorld, job: Any) -> dict[str, str]:
    key = f"kill_training {job.spec.seed}"
    if key not in place.kept:
        out: Path = place.new_folder() / "direct"
        train_directly(world, job, out)
        place.kept[key] = {
            name.replace("best_checkpoint/", "model/", 1): digest
            for name, digest in digests(out).items()
            if not name.startswith("latest_checkpoints/")
        }
    found: dict[str, str] = place.kept[key]
    return found


def _compare(world: FaultWorld, job_id: str, expected: dict[str, str]) -> None:
    assert world.job(job_id).state is JobState.SUCCEEDED
    (train,) = world.store.parts(OWNER, job_id, kind=UnitKind.TRAIN)
    assert {name: info.sha256 for name, info in train.stored.files.items()} == expected
    assert [step for step, _ in world.store.metrics(OWNER, job_id, key="loss")] == list(range(1, STEPS + 1))


FAULT = Fault("kill_training", "kill -9 during training", 100, scenario, quick=(1,), seconds=600.0)
