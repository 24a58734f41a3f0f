"""A conditional model end to end in embedded mode: trained on masks, drawn on procedural eyes and on a data set."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.data.ingest import check, write
from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.records import Dataset, Job
from cffa_core.jobs.spec import SamplerSpec, Scheduler
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import verify_archive
from cffa_core.rng import derive_seed
from cffa_core.storage.base import dataset_key
from cffa_core.storage.manifest import publish_folder
from tests.worker.world import OWNER, SIDE, World


def add_phantoms(world: World, count: int, seed: int) -> Dataset:
    """Procedural pairs with their vessel masks, taken in as the API does."""
    dataset_id = world.store.new_id("ds")
    source, folder = (world.settings.home / place / dataset_id for place in ("raw", "checked"))
    write_phantoms(source, count, seed, SIDE, processes=1)
    checked = check(source)
    index = write(checked, folder)
    stored = publish_folder(world.objects, folder, lambda name: dataset_key(dataset_id, name))
    return world.store.add_dataset(
        OWNER,
        dataset_id=dataset_id,
        name="phantoms",
        digest=index["digest"],
        pairs=count,
        report=checked.report(),
        stored=stored,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[tuple[World, Dataset, list[Job]]]:
    """A training job and two generation jobs of one installation, done by one worker."""
    world = World(tmp_path_factory.mktemp("structures") / "home", models_dir)
    try:
        dataset = add_phantoms(world, 3, seed=1)
        posted = world.training(
            dataset, method="controlnet", controlnet={"vessels": "masks"}, steps=2, checkpoint_every=2, preview_every=2
        )
        quick: dict[str, Any] = {"count": 4, "part_size": 2, "sampler": SamplerSpec(scheduler=Scheduler.DDIM, steps=2)}
        with world.worker_thread():
            trained = world.wait_terminal(posted.id, 300)
            assert trained.state is JobState.SUCCEEDED, trained.error
            model_id = trained.result["model_id"]
            jobs = [
                world.generation(model_id, structures="procedural", seed=9, **quick),
                world.generation(model_id, structures="dataset", structure_dataset_id=dataset.id, **quick),
            ]
            yield world, dataset, [trained, *(world.wait_terminal(job.id, 300) for job in jobs)]
    finally:
        world.close()


def manifest_of(world: World, job: Job, folder: Path) -> dict[str, Any]:
    assert job.state is JobState.SUCCEEDED, job.error
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    world.objects.fetch(final.stored.files["archive.zip"], folder / "archive.zip")
    return verify_archive(folder / "archive.zip")


def test_the_model_has_its_controlnets_and_the_data_set_its_masks(made: tuple[World, Dataset, list[Job]]) -> None:
    world, dataset, (trained, *_) = made
    assert {f"masks/vessel/p{i:05d}.png" for i in range(3)} <= set(dataset.stored.files)
    model = world.store.get_model(OWNER, trained.result["model_id"])
    assert {"controlnet_vessels.safetensors", "controlnet_tile.safetensors"} <= set(model.stored.files)
    assert (model.card["method"], model.card["settings"]["controlnet"]["vessels"]) == ("controlnet", "masks")


def test_procedural_structures_are_named_by_their_seed(made: tuple[World, Dataset, list[Job]], tmp_path: Path) -> None:
    world, _, (_, procedural, _) = made
    manifest = manifest_of(world, procedural, tmp_path)
    seeds = [{"procedural_seed": derive_seed(9, "structure", index)} for index in range(4)]
    assert [pair["structure"] for pair in manifest["pairs"]] == seeds
    assert manifest["spec"]["structures"] == "procedural" and "structures" not in manifest


def test_structures_of_a_data_set_are_named_by_their_pair(
    made: tuple[World, Dataset, list[Job]], tmp_path: Path
) -> None:
    world, dataset, (_, _, on_pairs) = made
    manifest = manifest_of(world, on_pairs, tmp_path)
    names = ["p00000", "p00001", "p00002", "p00000"]
    assert [pair["structure"] for pair in manifest["pairs"]] == [{"pair": name} for name in names]
    assert manifest["structures"] == {"digest": dataset.digest}
    assert dataset.id not in json.dumps(manifest)
    first, _, _, last = (pair["cf"]["sha256"] for pair in manifest["pairs"])
    assert first != last, "the same structure, but another seed"
