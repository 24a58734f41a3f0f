"""Jobs of the captioned model end to end with the child that computes: train, pause and go on, draw texts, caption."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.data.captions import parse_captions
from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.captioned_spec import CaptionedSizes
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Dataset, Job, Part
from cffa_core.jobs.spec import CaptionedSpec, CaptionedTrainingSpec, CaptionedTrainSettings
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.storage.manifest import fetch_files, read_verified
from tests.worker.world import OWNER, World

# One installation for the whole file, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("captioned jobs")

PAIRS = 7
STEPS = 40
SIZES = CaptionedSizes(
    embedding=16, latent_channels=16, unet=(8, 16, 24), image=8, decoder=64, text=16, text_layers=1, max_tokens=48
)
SETTINGS: dict[str, Any] = {
    "sizes": SIZES,
    "steps": STEPS,
    "batch_size": 2,
    "validate_every": STEPS,
    "checkpoint_every": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[World]:
    """One installation for this module."""
    world = World(tmp_path_factory.mktemp("captioned") / "home", models_dir)
    yield world
    world.close()


@pytest.fixture(scope="module")
def dataset(world: World) -> Dataset:
    """Procedural eyes with their captions."""
    raw = world.settings.home / "raw" / "eyes"
    write_phantoms(raw, PAIRS, seed=5, resolution=64, processes=1)
    return world.add_dataset(source=raw)


@pytest.fixture(scope="module")
def trained(world: World, dataset: Dataset) -> Job:
    """A training that was paused after its first checkpoint and resumed."""
    job = world.post(CaptionedTrainingSpec(dataset_id=dataset.id, **SETTINGS))
    with world.worker_thread():
        world.wait(lambda: world.store.checkpoints(OWNER, job.id))
        world.store.pause_job(OWNER, job.id)
        world.wait_state(job.id, JobState.PAUSED)
        world.store.resume_job(OWNER, job.id)
        return world.wait_terminal(job.id)


@pytest.fixture(scope="module")
def used(world: World, dataset: Dataset, trained: Job) -> tuple[Job, Job]:
    """Texts drawn, and the images of the data set captioned, with the model."""
    assert trained.result is not None, trained.error
    model_id = trained.result["model_id"]
    texts = ("A high quality color fundus photograph", "retinal structure")
    drawn = world.post(
        CaptionedSpec(model_id=model_id, task="text_to_image", texts=texts, images_per_text=2, ddim_steps=10)
    )
    said = world.post(
        CaptionedSpec(model_id=model_id, task="image_to_text", dataset_id=dataset.id, captions=2, max_images=3)
    )
    with world.worker_thread():
        return world.wait_terminal(drawn.id), world.wait_terminal(said.id)


def products(world: World, job: Job) -> tuple[Part, dict[str, Any]]:
    """The computing unit of a job that succeeded, and its manifest."""
    assert job.state is JobState.SUCCEEDED, job.error
    (unit,) = world.store.parts(OWNER, job.id, kind=UnitKind.COMPUTE)
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    return unit, json.loads(read_verified(world.objects, final.stored.files["manifest.json"]))


def test_a_training_leaves_a_model_of_its_family(world: World, dataset: Dataset, trained: Job) -> None:
    job = trained
    assert job.state is JobState.SUCCEEDED and job.result is not None, job.error
    model = world.store.get_model(OWNER, job.result["model_id"])
    assert (model.card["family"], model.card["dataset_digest"]) == ("captioned", dataset.digest)
    assert model.digest == job.result["model_digest"] and "model.json" in model.stored.files
    assert [saved.step for saved in world.store.checkpoints(OWNER, job.id)][-1] == STEPS
    assert world.store.metrics(OWNER, job.id)
    assert (job.progress.current, job.progress.total) == (STEPS, STEPS)


def test_a_training_that_was_paused_has_the_weights_of_one_that_was_not(
    world: World, dataset: Dataset, trained: Job, tmp_path: Path
) -> None:
    from cffa_core.recipes.captioned import run_captioned_training

    assert len(world.events(trained.id, "claimed")) == 3, "its two halves and its end"
    fetch_files(world.objects, dataset.stored, tmp_path / "dataset")
    out = tmp_path / "run"
    run_captioned_training(CaptionedTrainSettings(**SETTINGS), tmp_path / "dataset", out, FolderContext(out))
    assert trained.result is not None
    stored = world.store.get_model(OWNER, trained.result["model_id"]).stored.files["model.safetensors"]
    assert hashlib.sha256((out / "best_checkpoint" / "model.safetensors").read_bytes()).hexdigest() == stored.sha256


def test_texts_become_images_in_one_archive(world: World, trained: Job, used: tuple[Job, Job]) -> None:
    unit, manifest = products(world, used[0])
    names = set(unit.stored.files)
    assert {"report.json", "report.md", "sheet.png", "images.zip", "texts.jsonl"} <= names
    assert not any(name.startswith("images/") for name in names)
    data = read_verified(world.objects, unit.stored.files["images.zip"])
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.namelist() == [f"images/{index:06d}.png" for index in range(4)]
        assert all(archive.read(name).startswith(b"\x89PNG") for name in archive.namelist())
    assert trained.result is not None
    assert manifest["inputs"] == {"model_digest": trained.result["model_digest"]}
    assert manifest["format"] == "cffa-captioned-job/1"


def test_images_get_captions_that_a_data_set_may_be_given(
    world: World, dataset: Dataset, used: tuple[Job, Job]
) -> None:
    unit, manifest = products(world, used[1])
    text = read_verified(world.objects, unit.stored.files["captions.jsonl"]).decode()
    found, _ = parse_captions(text, {f"p{index:05d}" for index in range(PAIRS)})
    assert len(text.splitlines()) == 3 and set(found) <= {f"p{index:05d}" for index in range(3)}
    assert manifest["inputs"]["dataset"] == {"name": dataset.name, "digest": dataset.digest, "pairs": PAIRS}
    assert used[1].id not in json.dumps(manifest) and dataset.id not in json.dumps(manifest)
