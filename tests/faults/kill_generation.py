"""Kill -9 during generation: no part twice, none missing, and the archive has the bytes of an undisturbed run.

The reference is the same spec run directly, in this process, without service, worker or interruption.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Job
from cffa_core.jobs.spec import GenerationSpec, SamplerSpec, Scheduler
from cffa_core.jobs.state import UnitKind
from cffa_core.recipes.archive import merge_archives, verify_archive, write_part_archive
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.provenance import provenance
from cffa_core.storage.manifest import publish_folder
from tests.faults.campaign import Facts, Fault
from tests.faults.killing import assert_nothing_unrecorded, kill_at_random, one_thread, train_directly, world_for
from tests.faults.place import Place
from tests.faults.worlds import FaultWorld
from tests.worker.world import OWNER, SIDE

PAIRS = 29
SPECS = 4
DIGEST = "1" * 64


@dataclass(frozen=True)
class Reference:
    """Digests of what an undisturbed run makes: each part's archive, and the whole one."""

    parts: list[str]
    whole: str


def scenario(seed: int, place: Place) -> Facts:
    """Three kills in one generation; there are four specs, whose references are computed once per process."""
    dice = random.Random(seed)
    with world_for(seed, place) as world:
        model = trained_model(place)
        stored = publish_folder(world.objects, model, lambda name: f"models/adopted/{name}")
        spec = GenerationSpec(
            model_id=world.adopt_model(stored, DIGEST),
            resolution=SIDE,
            count=PAIRS,
            part_size=2,
            batch_size=2,
            sampler=SamplerSpec(scheduler=Scheduler.DDPM, steps=30),
            seed=seed % SPECS,
        )
        job = world.post(spec)
        kills = kill_at_random(world, job, dice, lambda: world.job(job.id).counts.generated, PAIRS // 2)
        finished = world.assert_succeeded(job.id)
        assert kills > 0
        repeated = _compare(world, finished, _reference(place, finished, model))
        assert repeated <= kills, f"{repeated} units were repeated after {kills} kills"
        assert_nothing_unrecorded(world, job)
        return {"points": kills, "repeated_units": repeated}


def trained_model(place: Place) -> Path:
    """Folder of a model trained with the micro base, once per process."""
    if "model" not in place.kept:
        with place.world() as world:
            job = world.training(world.add_dataset(), steps=4, preview_pairs=0)
            out = place.new_folder() / "run"
            train_directly(world, job, out)
            place.kept["model"] = out / "best_checkpoint"
    found: Path = place.kept["model"]
    return found


def _reference(place: Place, finished: Job, model: Path) -> Reference:
    """Sample directly, under the numerics key that the job is bound to."""
    key = f"kill_generation {finished.spec.seed} {finished.numerics_key}"
    if key not in place.kept:
        settings = finished.spec.settings()
        header = provenance(settings, model_digest=DIGEST, dataset_digest=None, numerics_key=finished.numerics_key)
        out = place.new_folder()
        zips = []
        with one_thread():
            sampler = load_sampler(settings, model, "micro", models_dir=place.models_dir)
            for part in range(settings.parts):
                generate_part(sampler, settings, part, out / str(part), FolderContext(out / "context"))
                zips.append(out / f"{part}.zip")
                write_part_archive(out / str(part), zips[-1], header)
        merge_archives(zips, out / "whole.zip", header)
        place.kept[key] = Reference([_sha256(path) for path in zips], _sha256(out / "whole.zip"))
    found: Reference = place.kept[key]
    return found


def _compare(world: FaultWorld, job: Job, expected: Reference) -> int:
    """Assert that the job made the same bytes; returns how many units were begun more than once."""
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    whole = world.settings.home / "archive.zip"
    world.objects.fetch(final.stored.files["archive.zip"], whole)
    assert len(verify_archive(whole)["pairs"]) == PAIRS
    assert _sha256(whole) == expected.whole
    parts = world.store.parts(OWNER, job.id, kind=UnitKind.PART)
    assert [part.stored.files["pairs.zip"].sha256 for part in parts] == expected.parts
    return sum(part.attempt - 1 for part in [*parts, final])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


FAULT = Fault("kill_generation", "kill -9 during generation", 200, scenario, quick=(1,), seconds=600.0)
