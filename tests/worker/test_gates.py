"""A gated job and a regenerated pair through the real worker: embedded mode, micro base, a child that computes."""

from __future__ import annotations

import json
import os
import signal
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cffa_core import __version__
from cffa_core.evaluation.pair_scores import TrainingPairs
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import NOVELTY_FILE, Counts, Job, StoredFiles
from cffa_core.jobs.spec import GateSpec, GenerateSettings, GenerationSpec, SamplerSpec, Scheduler
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import verify_archive
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.regenerate import regeneration
from cffa_core.storage.manifest import fetch_files
from tests.worker.world import OWNER, SIDE, World, child_pids

TRIES = 3
COUNT = 5
GRID: dict[str, Any] = {"count": COUNT, "part_size": 3, "sampler": SamplerSpec(scheduler=Scheduler.DDPM, steps=40)}


@dataclass(frozen=True)
class Made:
    """A model of an installation, and every try of every slot, drawn here one by one: ``tries[k][index]``."""

    world: World
    model_id: str
    tries: list[list[dict[str, Any]]]

    @property
    def least(self) -> float:
        """A least ridge correlation with all cases: a first try passes, a later one does, a slot stays empty."""
        values = sorted(pair["alignment"]["ridge_correlation"] for attempt in self.tries for pair in attempt)
        for below, above in pairwise(values):
            filled = self.filled((below + above) / 2)
            if len(filled) < COUNT and {0} < {pair["try"] for pair in filled}:
                return (below + above) / 2
        raise AssertionError("these seeds do not give all cases; take others")

    def filled(self, least: float) -> list[dict[str, Any]]:
        """What fills the slots, worked out from all tries."""
        slots = zip(*self.tries, strict=True)
        good = ([pair for pair in slot if pair["alignment"]["ridge_correlation"] >= least] for slot in slots)
        return [pairs[0] for pairs in good if pairs]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("gates")
    world = World(folder / "home", models_dir)
    threads = torch.get_num_threads()
    try:
        posted = world.training(world.add_dataset(), steps=2, validate_every=2, preview_pairs=0)
        with world.worker_thread():
            trained = world.wait_terminal(posted.id)
        assert trained.state is JobState.SUCCEEDED, trained.error
        model_id = trained.result["model_id"]
        fetch_files(world.objects, world.store.get_model(OWNER, model_id).stored, folder / "model")
        novelty = world.store.novelty_file(OWNER, model_id)
        assert novelty is not None
        fetch_files(world.objects, StoredFiles({NOVELTY_FILE: novelty}), folder)
        training = TrainingPairs.read(folder / NOVELTY_FILE)
        settings = GenerateSettings(resolution=SIDE, batch_size=2, **GRID)
        torch.set_num_threads(1)
        sampler = load_sampler(settings, folder / "model", "micro", models_dir=models_dir)
        tries = []
        for k in range(TRIES):
            alone = settings.model_copy(update={"only": tuple((i, k) for i in range(COUNT)), "part_size": COUNT})
            out = folder / f"try{k}"
            tries.append(generate_part(sampler, alone, 0, out, FolderContext(out), None, training)["pairs"])
        yield Made(world, model_id, tries)
    finally:
        torch.set_num_threads(threads)
        world.close()


@pytest.fixture(scope="module")
def gated(made: Made) -> Job:
    """A gated job whose first child was killed."""
    world = made.world
    job = world.generation(made.model_id, gate=GateSpec(min_alignment=made.least, max_tries=TRIES), **GRID)
    worker = world.start_worker()
    world.wait(lambda: world.job(job.id).progress.stage == "sampling")
    for pid in child_pids(worker.pid):
        os.kill(pid, signal.SIGKILL)
    done = world.wait_terminal(job.id)
    worker.send_signal(signal.SIGTERM)
    worker.wait(10)
    assert world.events(job.id, "crashed"), "the child was killed too late"
    return done


def manifest_of(world: World, job: Job) -> dict[str, Any]:
    """The verified manifest of a finished job's archive."""
    assert job.state is JobState.SUCCEEDED, job.error
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    path = world.settings.home / f"{job.id}.zip"
    world.objects.fetch(final.stored.files["archive.zip"], path)
    return verify_archive(path)


def entry(world: World, job: Job, index: int) -> dict[str, Any]:
    """A pair as the index of its part lists it."""
    assert isinstance(job.spec, GenerationSpec)
    part = world.store.parts(OWNER, job.id, kind=UnitKind.PART, first=job.spec.part_of(index) or 0, limit=1)[0]
    listed = json.loads(world.objects.get_bytes(part.stored.files["part.json"].key))["pairs"]
    return next(pair for pair in listed if pair["index"] == index)


def test_a_gated_job_takes_the_same_pairs_after_a_kill(made: Made, gated: Job) -> None:
    manifest, pairs = manifest_of(made.world, gated), made.filled(made.least)
    assert manifest["pairs"] == pairs
    assert [slot["tries"] for slot in manifest["exhausted"]] == [TRIES] * (COUNT - len(pairs))
    rejected = sum(pair["try"] for pair in pairs) + TRIES * (COUNT - len(pairs))
    drawn, empty = len(pairs) + rejected, COUNT - len(pairs)
    assert gated.counts == Counts(COUNT, drawn, accepted=len(pairs), rejected=rejected, failed=empty)
    assert (gated.result["pairs"], gated.result["exhausted"]) == (len(pairs), empty)


def test_the_archive_says_where_its_pairs_come_from(made: Made, gated: Job) -> None:
    manifest, model = manifest_of(made.world, gated), made.world.store.get_model(OWNER, made.model_id)
    dataset = made.world.store.list_datasets(OWNER).items[0]
    assert manifest["format"] == "cffa-archive/2" and manifest["synthetic"] is True
    assert (manifest["model_digest"], manifest["dataset_digest"]) == (model.digest, dataset.digest)
    assert gated.numerics_key is not None
    torch_version, diffusers = gated.numerics_key.split("/torch-")[1].split("/")[:2]
    versions = {"cffa": __version__, "torch": torch_version, "diffusers": diffusers.removeprefix("diffusers-")}
    assert manifest["versions"] == versions
    assert GenerateSettings.model_validate(manifest["spec"]).gate == GateSpec(min_alignment=made.least, max_tries=TRIES)
    path = made.world.settings.home / f"{gated.id}.zip"
    with zipfile.ZipFile(path) as archive, Image.open(archive.open(manifest["pairs"][0]["fa"]["name"])) as fa:
        # What the recipe reads off the model's folder is what the record calls the model.
        assert (fa.text["Synthetic Data"], fa.text["Model digest"]) == ("YES", model.digest)
    for pair in manifest["pairs"]:
        assert pair["novelty"]["nearest"] in {"p0", "p1", "p2", "p3"} and 0 <= pair["novelty"]["similarity"] <= 1


def test_refused_pairs_are_stored_apart(made: Made, gated: Job) -> None:
    found = []
    for part in made.world.store.parts(OWNER, gated.id, kind=UnitKind.PART):
        if "rejects.zip" in part.stored.files:
            path = made.world.settings.home / "rejects.zip"
            made.world.objects.fetch(part.stored.files["rejects.zip"], path)
            refused = verify_archive(path)
            assert refused["synthetic"] is True and refused["format"] == "cffa-rejects/1"
            found += refused["pairs"]
    assert len(found) == gated.counts.rejected
    for pair in found:
        assert pair["reasons"] == ["too_little_aligned"]
        assert pair["cf"]["sha256"] == made.tries[pair["try"]][pair["index"]]["cf"]["sha256"]


def test_thumbnails_of_patients_stay_out_of_the_model(made: Made) -> None:
    model = made.world.store.get_model(OWNER, made.model_id)
    assert not [name for name in model.stored.files if "novelty" in name]
    found = made.world.store.novelty_file(OWNER, made.model_id)
    assert found is not None and found.key.startswith(f"jobs/{model.job_id}/train/")


def test_a_pair_is_regenerated_to_the_last_bit_and_under_its_numerics_alone(made: Made, gated: Job) -> None:
    world, wanted = made.world, next(pair for pair in made.filled(made.least) if pair["try"])
    assert isinstance(gated.spec, GenerationSpec)
    original = entry(world, gated, wanted["index"])
    again = world.post(regeneration(gated.spec, gated.id, original))
    two_threads = World(world.settings.home, world.settings.models_dir or Path(), threads=2)
    try:
        with two_threads.worker_thread():
            reason = world.wait(lambda: world.job(again.id).reason)
    finally:
        two_threads.close()
    assert reason.startswith("numerics_mismatch") and world.job(again.id).state is not JobState.SUCCEEDED
    with world.worker_thread():
        done = world.wait_terminal(again.id)
    found = done.result["regenerated"]
    assert (found["job_id"], found["index"], found["same"]) == (gated.id, wanted["index"], True)
    assert found["cf"]["sha256"] == found["cf"]["original"] == wanted["cf"]["sha256"]
    (pair,) = manifest_of(world, done)["pairs"]
    assert pair == wanted
