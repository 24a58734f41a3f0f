"""A unit that kills its child every time: segmentation fault, abort, the system's memory killer, no memory left.

It fails after exactly three crashes, and jobs beside it notice nothing.
"""

from __future__ import annotations

import random

from cffa_core.jobs.state import JobState
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.worlds import FaultWorld
from tests.worker.scripted_child import Act
from tests.worker.world import OWNER, scripted

NEIGHBOURS = 3
DEATHS = (Act.SEGFAULT, Act.ABORT, Act.KILLED_FOR_MEMORY, Act.OUT_OF_MEMORY)


def scenario(seed: int, place: Place) -> Facts:
    """One poisoned part or training among jobs that finish."""
    dice = random.Random(seed)
    death, part = DEATHS[seed % len(DEATHS)], dice.random() < 0.5
    with place.world(lease_seconds=6.0) as world:
        model_id = world.adopt_model()
        neighbours = [_neighbour(world, model_id, dice) for _ in range(NEIGHBOURS)]
        if part:
            poison = world.generation(model_id, count=1, part_size=1, seed=int(death))
        else:
            poison = world.training(world.add_unread_dataset(), seed=int(death))
        neighbours += [_neighbour(world, model_id, dice) for _ in range(NEIGHBOURS)]
        for _ in range(2):
            world.start_worker(scripted())
        for job_id in neighbours:
            world.wait_terminal(job_id)
            world.assert_succeeded(job_id)
            assert world.events(job_id, "crashed") + world.events(job_id, "worker_lost") == []
            claims = world.events(job_id, "claimed")
            assert {claim["attempt"] for claim in claims} == {1}
        failed = world.wait_terminal(poison.id)
        assert failed.state is JobState.FAILED
        assert failed.error is not None and failed.error["code"] == "crashed", failed.error
        crashes = world.events(poison.id, "crashed")
        assert len(crashes) == 3 == len(world.events(poison.id, "claimed"))
        assert world.store.parts(OWNER, poison.id) == []
        return {"crashes": len(crashes), "death": death.name}


def _neighbour(world: FaultWorld, model_id: str, dice: random.Random) -> str:
    if dice.random() < 0.5:
        return world.generation(model_id, count=6, part_size=2, seed=int(Act.FINISH)).id
    return world.training(world.add_unread_dataset(), seed=int(Act.FINISH)).id


FAULT = Fault("poison_unit", "poison unit (segfault, abort, memory)", 40, scenario, quick=(4, 7))
