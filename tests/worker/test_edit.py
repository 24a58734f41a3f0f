"""Edit jobs end to end with the real child and the micro base: of a data set, of an earlier job; death and damage."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cffa_core.data.ingest import check, write
from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Dataset, Job
from cffa_core.jobs.spec import EditSettings, EditSpec, EditTerm, EvaluationSpec, ExportSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import verify_archive
from cffa_core.recipes.edit import load_editor
from cffa_core.storage.base import dataset_key
from cffa_core.storage.manifest import publish_folder, read_verified
from services.worker.edit import edit
from services.worker.orders import order_for
from services.worker.protocol import WorkOrder
from services.worker.scratch import Scratch
from tests.api.driving import Worker
from tests.generated_parts import commit_part, commit_whole
from tests.worker.world import OWNER, SIDE, World, child_pids, write_pairs

# One installation for the whole file, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("edit jobs")

Made = tuple[World, Dataset, Job]


def post(world: World, **fields: Any) -> Job:
    """An edit of a few steps with the base alone, in parts of two pairs."""
    values: dict[str, Any] = {
        "base": "micro",
        "edits": (EditTerm(text="haemorrhages"),),
        "resolution": SIDE,
        "steps": 6,
        "part_size": 2,
    }
    return world.post(EditSpec(**(values | fields)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Made]:
    """An installation in which all three pairs of a data set were edited."""
    world = World(tmp_path_factory.mktemp("edits") / "home", models_dir)
    dataset = world.add_dataset(3)
    posted = post(world, dataset_id=dataset.id)
    assert (posted.spec.count, posted.counts.requested) == (3, 3)  # type: ignore[union-attr]
    with world.worker_thread():
        done = world.wait_terminal(posted.id)
    assert done.state is JobState.SUCCEEDED, done.error
    yield world, dataset, done
    world.close()


def whole(world: World, job: Job, folder: Path) -> dict[str, Any]:
    """The manifest of the whole archive, which is left as ``folder/archive.zip``."""
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    path = folder / "archive.zip"
    path.unlink(missing_ok=True)
    world.objects.fetch(final.stored.files["archive.zip"], path)
    return verify_archive(path)


def pixels(data: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(data))).astype(np.int16)


def edited_here(world: World, job: Job, folder: Path) -> tuple[WorkOrder, list[dict[str, Any]]]:
    """The first part of a job, edited in this process and stored but not committed: its order and listed pairs."""
    claim = world.store.claim("by hand", [Kind.EDIT], lease_seconds=60)
    assert claim is not None and claim.job_id == job.id and isinstance(claim.spec, EditSpec)
    (folder / "unit").mkdir()
    try:
        with closing(Scratch(folder, "by hand")) as scratch:
            order = order_for(world.store, world.settings, scratch, claim)
            order = order.model_copy(update={"folder": str(folder / "unit")})
            editor = load_editor(claim.spec.settings(), None, "micro", models_dir=world.settings.models_dir)
            done = edit(order, claim.spec, FolderContext(folder), world.objects, editor, {})
    finally:
        world.store.cancel_job(OWNER, job.id)
        world.store.release(claim)
    listing = json.loads(read_verified(world.objects, done.stored.files["part.json"]))
    return order, listing["pairs"]


def test_the_archive_holds_pairs_masks_and_sheets_and_says_where_they_come_from(made: Made, tmp_path: Path) -> None:
    world, dataset, job = made
    manifest = whole(world, job, tmp_path)
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        members = archive.namelist()
        marks = Image.open(io.BytesIO(archive.read("cf/000001.png"))).info
    assert members[:4] == ["cf/000000.png", "fa/000000.png", "mask/000000.png", "sheet/000000.png"]
    assert len(members) == 4 * 3 + 1
    assert (manifest["synthetic"], manifest["edited"], manifest["base"]) == (True, True, "micro")
    assert (manifest["model_digest"], manifest["source"]) == (None, {"dataset": dataset.digest})
    assert EditSettings.model_validate(manifest["spec"]).edits == (EditTerm(text="haemorrhages"),)
    assert manifest["numerics_key"] == job.numerics_key
    stored = dataset.stored.files
    assert [pair["source"] for pair in manifest["pairs"]] == [
        {"dataset": dataset.digest, "name": name, "cf": stored[f"cf/{name}.png"].sha256,
         "fa": stored[f"fa/{name}.png"].sha256}
        for name in ("p0", "p1", "p2")
    ]  # fmt: skip
    assert all(0 < pair["mask_share"] <= 1 for pair in manifest["pairs"])
    assert (marks["Synthetic Data"], marks["Edit"]) == ("YES", "add haemorrhages")
    text = json.dumps(manifest)
    assert not any(name in text for name in (job.id, dataset.id, OWNER, str(world.settings.home)))
    assert job.result is not None and job.result["pairs"] == 3
    assert (job.counts.generated, job.progress.current, job.progress.total) == (3, 3, 3)


def test_each_pair_is_that_of_its_source_outside_its_mask(made: Made, tmp_path: Path) -> None:
    world, dataset, job = made
    whole(world, job, tmp_path)
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        for index in range(3):
            outside = pixels(archive.read(f"mask/{index:06d}.png")) == 0
            for modality in ("cf", "fa"):
                source = pixels(read_verified(world.objects, dataset.stored.files[f"{modality}/p{index}.png"]))
                edited = pixels(archive.read(f"{modality}/{index:06d}.png"))
                assert np.array_equal(edited[outside], source[outside]), (index, modality)
                assert edited.shape == source.shape


def test_every_image_is_a_byte_range_of_its_parts_archive(made: Made) -> None:
    world, _, job = made
    for part in world.store.parts(OWNER, job.id, kind=UnitKind.PART):
        assert set(part.stored.files) == {"pairs.zip", "part.json"}
        raw = read_verified(world.objects, part.stored.files["pairs.zip"])
        for pair in json.loads(read_verified(world.objects, part.stored.files["part.json"]))["pairs"]:
            for name in ("cf", "fa", "mask", "sheet"):
                image = raw[pair[name]["offset"] : pair[name]["offset"] + pair[name]["size"]]
                assert hashlib.sha256(image).hexdigest() == pair[name]["sha256"]


def test_a_killed_child_repeats_its_part_with_the_same_bytes(made: Made) -> None:
    world, dataset, job = made
    again = post(world, dataset_id=dataset.id, steps=6)
    worker = world.start_worker()
    try:
        world.wait(lambda: world.job(again.id).counts.generated >= 2 or None, why="the first part")
        for child in child_pids(worker.pid):
            os.kill(child, signal.SIGKILL)
        done = world.wait_terminal(again.id)
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
    assert done.state is JobState.SUCCEEDED, done.error
    assert done.result == job.result and done.counts.generated == 3
    kept = {info.key for part in world.store.parts(OWNER, again.id) for info in part.stored.files.values()}
    assert set(world.objects.list(f"jobs/{again.id}/")) == kept


def test_pairs_of_an_edit_are_edited_further_and_exported(made: Made, tmp_path: Path) -> None:
    world, _, job = made
    posted = post(
        world, generation_job_id=job.id, pair_indices=(2, 0), edits=(EditTerm(text="disc", direction="remove"),)
    )
    exported = world.post(ExportSpec(generation_job_id=job.id, form="webdataset", shard_size=10))
    zipped = world.post(ExportSpec(generation_job_id=job.id, form="zip", shard_size=10))
    with world.worker_thread():
        done = world.wait_terminal(posted.id)
        exports = [world.wait_terminal(one.id) for one in (exported, zipped)]
    assert done.state is JobState.SUCCEEDED, done.error
    before = {pair["index"]: pair for pair in whole(world, job, tmp_path)["pairs"]}
    manifest = whole(world, done, tmp_path)
    assert job.result is not None
    origin = {"edit": job.result["manifest"]["sha256"]}
    assert [pair["source"] for pair in manifest["pairs"]] == [
        origin | {"index": index, "cf": before[index]["cf"]["sha256"], "fa": before[index]["fa"]["sha256"]}
        for index in (2, 0)
    ]
    assert [one.state for one in exports] == [JobState.SUCCEEDED] * 2, [one.error for one in exports]
    (unit,) = world.store.parts(OWNER, exports[1].id, kind=UnitKind.EXPORT)
    world.objects.fetch(unit.stored.files["pairs-000000.zip"], tmp_path / "export.zip")
    pairs = verify_archive(tmp_path / "export.zip")["pairs"]
    assert [("mask" in pair, "sheet" in pair) for pair in pairs] == [(True, False)] * 3
    (unit,) = world.store.parts(OWNER, exports[0].id, kind=UnitKind.EXPORT)
    assert b"000002.mask.png" in read_verified(world.objects, unit.stored.files["pairs-000000.tar"])


def test_of_a_generation_job_the_bytes_of_the_pairs_alone_are_needed(made: Made, tmp_path: Path) -> None:
    world, _, _ = made
    world.training(world.add_unread_dataset())
    model = Worker(world.store, world.objects, tmp_path / "training").train()
    generation = world.generation(model, count=6, part_size=2)
    while (claim := world.store.claim("by hand", [Kind.GENERATION], lease_seconds=60)) is not None:
        (commit_part if claim.kind is UnitKind.PART else commit_whole)(world.store, world.objects, claim, tmp_path)
    job = post(world, generation_job_id=generation.id, pair_indices=(5, 4, 1), part_size=2)
    order, listed = edited_here(world, job, tmp_path)
    assert order.facts["sources"] == [[0, 5], [1, 4]] and set(order.inputs) == {"pairs"}
    assert set(order.inputs["pairs"].files) == {"00002/pairs.zip", "00002/part.json"}
    assert [pair["source"]["index"] for pair in listed] == [5, 4]


def test_an_evaluation_measures_edited_pairs(made: Made, tmp_path: Path) -> None:
    world, dataset, job = made
    posted = world.post(EvaluationSpec(generation_job_id=job.id, reference_dataset_id=dataset.id, max_pairs=2))
    claim = world.store.claim("by hand", [Kind.EVALUATION], lease_seconds=60)
    assert claim is not None and claim.job_id == posted.id
    with closing(Scratch(tmp_path, "by hand")) as scratch:
        order = order_for(world.store, world.settings, scratch, claim)
    assert order.facts["sets"]["pairs"]["name"] == "edited" and len(order.facts["indices"]) == 2
    world.store.cancel_job(OWNER, posted.id)
    world.store.release(claim)


def with_area(world: World) -> Dataset:
    """A data set of one pair whose left half may change."""
    dataset_id = world.store.new_id("ds")
    source = write_pairs(world.settings.home / "raw" / dataset_id, 1)
    left = np.zeros((SIDE, SIDE), np.uint8)
    left[:, : SIDE // 2] = 255
    (source / "masks/left").mkdir(parents=True)
    Image.fromarray(left).save(source / "masks/left/p0.png")
    folder = world.settings.home / "checked" / dataset_id
    checked = check(source)
    index = write(checked, folder)
    stored = publish_folder(world.objects, folder, lambda name: dataset_key(dataset_id, name))
    about: dict[str, Any] = {"name": "A", "digest": index["digest"], "pairs": 1, "report": {}, "stored": stored}
    return world.store.add_dataset(OWNER, dataset_id=dataset_id, **about)


def test_nothing_outside_the_area_changes(made: Made, tmp_path: Path) -> None:
    world, _, _ = made
    dataset = with_area(world)
    job = post(world, dataset_id=dataset.id, area="left", edits=(EditTerm(text="haemorrhages", strength=20),))
    _, (pair,) = edited_here(world, job, tmp_path)
    assert pair["source"]["area"] == dataset.stored.files["masks/left/p0.png"].sha256
    mask = pixels((tmp_path / "unit" / "part" / "mask/000000.png").read_bytes())
    assert mask[:, : SIDE // 2].any() and not mask[:, SIDE // 2 :].any()


def test_a_flipped_byte_of_a_source_is_found_before_it_is_edited(made: Made, tmp_path: Path) -> None:
    world, _, _ = made
    dataset = world.add_dataset(1)
    path = world.settings.objects_dir / dataset.stored.files["fa/p0.png"].key
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    job = post(world, dataset_id=dataset.id)
    with pytest.raises(CorruptArtifact):
        edited_here(world, job, tmp_path)
    assert list(world.objects.list(f"jobs/{job.id}/")) == []
