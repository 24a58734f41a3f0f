"""Export jobs end to end with the real child: every form, the same bytes twice, partial, damage, death, memory."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from cffa_core.errors import Cancelled
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Claim, Job, Part, StoredFiles
from cffa_core.jobs.spec import ExportSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import verify_archive, write_part_archive
from cffa_core.storage.local import LocalStore
from cffa_core.storage.manifest import read_verified
from services.worker import loop
from services.worker.export import export
from services.worker.orders import order_for
from services.worker.protocol import WorkOrder
from services.worker.scratch import Scratch
from tests.api.driving import Worker
from tests.generated_parts import commit_part, pixels
from tests.worker.world import OWNER, World, child_pids, running_worker

# One installation for the whole file, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("export jobs")

PART = 4
Made = tuple[World, Job]


def train(world: World, folder: Path) -> str:
    """A model in the record that nobody trained."""
    world.training(world.add_unread_dataset())
    return Worker(world.store, world.objects, folder / "training").train()


def generated(world: World, folder: Path, model_id: str, *, parts: int, finished: int) -> Job:
    """A generation job of ``parts`` parts with ``finished`` of them made."""
    job = world.generation(model_id, count=PART * parts, part_size=PART)
    for _ in range(finished):
        claim = world.store.claim("by hand", [Kind.GENERATION], lease_seconds=60)
        assert claim is not None and claim.job_id == job.id
        commit_part(world.store, world.objects, claim, folder)
    return job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[Made]:
    """An installation with a running job of which 3 of 4 parts are finished."""
    folder = tmp_path_factory.mktemp("export")
    # The unfinished part is not to be made: only exports are worked on.
    world = World(folder / "home", models_dir, worker_kinds="export")
    yield world, generated(world, folder, train(world, folder), parts=4, finished=3)
    world.close()


def exported(world: World, job: Job, form: str = "zip", **fields: Any) -> Job:
    """A finished export of ``job``."""
    spec = {"generation_job_id": job.id, "form": form, "shard_size": 5} | fields
    posted = world.post(ExportSpec.model_validate(spec))
    with running_worker(loop.Worker(world.settings, kinds=[Kind.EXPORT])):
        return world.wait_terminal(posted.id)


def products(world: World, job: Job) -> tuple[Part, dict[str, bytes], dict[str, Any]]:
    """The unit that exported, its archives, and the manifest."""
    (unit,) = world.store.parts(OWNER, job.id, kind=UnitKind.EXPORT)
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    archives = {name: read_verified(world.objects, info) for name, info in sorted(unit.stored.files.items())}
    return unit, archives, json.loads(read_verified(world.objects, final.stored.files["manifest.json"]))


def members(data: bytes) -> dict[str, bytes]:
    """Name and content of every member of a zip or tar."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_shards_of_the_finished_parts_and_their_manifest(made: Made) -> None:
    world, generation = made
    done = exported(world, generation, "webdataset")
    assert done.state is JobState.SUCCEEDED, done.error
    unit, archives, manifest = products(world, done)
    assert list(archives) == ["pairs-000000.tar", "pairs-000001.tar", "pairs-000002.tar"]
    found = members(archives["pairs-000001.tar"])
    assert list(found) == [f"{i:06d}.{kind}" for i in range(5, 10) for kind in ("cf.png", "fa.png", "json")]
    told = json.loads(found["000007.json"])
    assert (told["index"], told["synthetic"], told["model_digest"]) == (7, True, "ab" * 32)
    assert told["spec"]["count"] == 16 and told["alignment"]["ridge_correlation"] == 0.7
    assert [file["pairs"] for file in manifest["files"]] == [5, 5, 2]
    for file in manifest["files"]:
        data = archives[file["name"]]
        assert (file["size"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert done.result == {
        "form": "webdataset",
        "pairs": 12,
        "files": 3,
        "bytes": sum(map(len, archives.values())),
        "manifest": {"sha256": done.result["manifest"]["sha256"]} if done.result else None,
    }
    text = json.dumps(manifest)
    assert not any(id_ in text for id_ in (done.id, generation.id, str(world.settings.home)))
    assert (done.progress.current, done.progress.total, done.numerics_key) == (1, 1, None)
    keys = sorted(info.key for info in unit.stored.files.values())
    assert sorted(world.objects.list(f"jobs/{done.id}/export/")) == keys


def test_zips_are_archives_of_pairs_and_dicom_files_have_their_pixels(made: Made, tmp_path: Path) -> None:
    world, generation = made
    _, archives, _ = products(world, exported(world, generation, "zip", selection={"indices": [1, 6, 11]}))
    (tmp_path / "pairs.zip").write_bytes(archives["pairs-000000.zip"])
    manifest = verify_archive(tmp_path / "pairs.zip")
    assert [pair["index"] for pair in manifest["pairs"]] == [1, 6, 11]
    assert manifest["versions"].keys() == {"cffa", "torch", "diffusers"} and manifest["dataset_digest"] == "cd" * 32
    _, archives, _ = products(world, exported(world, generation, "dicom", selection={"min_alignment": 1.0}))
    found = members(archives["dicom-000000.zip"])
    assert list(found) == ["000010/cf.dcm", "000010/fa.dcm", "000011/cf.dcm", "000011/fa.dcm"]
    read = pydicom.dcmread(io.BytesIO(found["000011/cf.dcm"]))
    assert np.array_equal(read.pixel_array, pixels("cf", 11)) and read[0x0008, 0x001C].value == "YES"


@pytest.mark.parametrize("form", ["zip", "webdataset", "dicom"])
def test_the_same_export_has_the_same_digests(made: Made, form: str) -> None:
    world, generation = made
    wanted = {"selection": {"first": 2, "last": 9}, "shard_size": 3}
    first, second = (exported(world, generation, form, **wanted) for _ in range(2))
    assert first.result == second.result
    assert products(world, first)[1:] == products(world, second)[1:]


def test_a_selection_that_nothing_meets_fails_with_what_to_do(made: Made) -> None:
    world, generation = made
    failed = exported(world, generation, selection={"min_alignment": 2.0})
    assert failed.state is JobState.FAILED and failed.error is not None
    assert (failed.error["code"], "no pair fits" in failed.error["message"]) == ("invalid_spec", True)
    assert list(world.objects.list(f"jobs/{failed.id}/")) == []


def test_a_flipped_byte_is_found(made: Made) -> None:
    world, generation = made
    part = world.store.parts(OWNER, generation.id, kind=UnitKind.PART)[1]
    path = world.settings.objects_dir / part.stored.files["pairs.zip"].key
    whole = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    try:
        failed = exported(world, generation)
    finally:
        path.write_bytes(whole)
    assert failed.error is not None and failed.error["code"] == "corrupt_artifact"
    assert "cf/000004.png" in failed.error["message"]


def test_a_killed_child_repeats_the_unit_and_leaves_nothing_of_its_own(made: Made) -> None:
    world, generation = made
    spec = ExportSpec(generation_job_id=generation.id, form="webdataset", shard_size=1)
    whole = exported(world, generation, "webdataset", shard_size=1)
    job = world.post(spec)
    worker = world.start_worker()
    world.wait(lambda: list(world.objects.list(f"jobs/{job.id}/export/a1/")), why="the first shard")
    for child in child_pids(worker.pid):
        os.kill(child, signal.SIGKILL)
    done = world.wait_terminal(job.id)
    assert done.state is JobState.SUCCEEDED, done.error
    assert done.result == whole.result
    (unit,) = world.store.parts(OWNER, job.id, kind=UnitKind.EXPORT)
    kept = sorted(info.key for info in unit.stored.files.values())
    assert sorted(world.objects.list(f"jobs/{job.id}/export/")) == kept
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0


@pytest.mark.parametrize("form", ["zip", "webdataset", "dicom"])
def test_cancel_leaves_an_export_between_two_pairs(made: Made, tmp_path: Path, form: str) -> None:
    world, generation = made
    job = world.post(ExportSpec.model_validate({"generation_job_id": generation.id, "form": form}))
    claim = world.store.claim("by hand", [Kind.EXPORT], lease_seconds=60)
    assert claim is not None and claim.job_id == job.id
    with closing(Scratch(tmp_path, "by hand")) as scratch:
        leave_at_third_pair(world, claim, scratch, tmp_path / "out")
    assert list(world.objects.list(f"jobs/{job.id}/")) == []
    world.store.cancel_job(OWNER, job.id)
    world.store.release(claim)
    assert world.job(job.id).state is JobState.CANCELED


def leave_at_third_pair(world: World, claim: Claim, scratch: Scratch, out: Path) -> None:
    """Begin the claimed export and stop it as a supervisor would."""
    order = order_for(world.store, world.settings, scratch, claim)
    seen: list[int] = []

    def stop_at_the_third_pair(stage: str, current: int, total: int) -> None:
        seen.append(current)
        if len(seen) == 4:
            raise Cancelled("the job is being cancelled")

    assert isinstance(order.spec, ExportSpec)
    with pytest.raises(Cancelled):
        export(order, order.spec, FolderContext(out, stop_at_the_third_pair), world.objects)
    assert seen == [0, 0, 0, 0]


def test_an_export_of_a_job_that_was_deleted_meanwhile_fails(world: World, tmp_path: Path) -> None:
    generation = generated(world, tmp_path, train(world, tmp_path), parts=2, finished=1)
    job = world.post(ExportSpec(generation_job_id=generation.id))
    world.store.cancel_job(OWNER, generation.id)
    world.store.delete_job(OWNER, generation.id)
    with running_worker(loop.Worker(world.settings, kinds=[Kind.EXPORT])):
        failed = world.wait_terminal(job.id)
    assert failed.error is not None and failed.error["code"] == "not_found"


@pytest.mark.parametrize("form", ["zip", "webdataset"])
def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path: Path, form: str) -> None:
    objects = LocalStore(tmp_path / "objects", secret=b"s" * 32, base_url="http://127.0.0.1")
    peaks = [peak_of_export(objects, tmp_path / str(parts), form, parts) for parts in (4, 24)]
    assert peaks[1] - peaks[0] < 150_000, peaks


def peak_of_export(objects: LocalStore, folder: Path, form: str, parts: int) -> int:
    """Peak of traced memory, in bytes, of the export of so many parts of 8 pairs of two images of 50 kB."""
    files = {}
    for part in range(parts):
        place = folder / "part"
        entries = []
        for index in range(8 * part, 8 * part + 8):
            entry: dict[str, Any] = {"index": index, "seed": index}
            for modality in ("cf", "fa"):
                data, name = os.urandom(50_000), f"{modality}/{index:06d}.png"
                (place / modality).mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(data)
                entry[modality] = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            entries.append(entry)
        (place / "part.json").write_text(json.dumps({"pairs": entries}))
        index = write_part_archive(place, place / "pairs.zip", {"spec": {}})
        (place / "part.json").write_text(json.dumps(index))
        for name in ("pairs.zip", "part.json"):
            files[f"{part:05d}/{name}"] = objects.put_file(f"{folder.name}/{part}/{name}", place / name)
        shutil.rmtree(place)
    spec = ExportSpec.model_validate({"generation_job_id": "job_" + "0" * 20, "form": form, "shard_size": 16})
    order = WorkOrder(
        settings={},
        job_id=f"job-{folder.name}",
        kind=UnitKind.EXPORT,
        index=0,
        attempt=1,
        spec=spec,
        numerics_key=None,
        checkpoints=(),
        inputs={"parts": StoredFiles(files)},
        facts={},
        folder=str(folder),
        cache=str(folder),
    )
    tracemalloc.start()
    try:
        done = export(order, spec, FolderContext(folder / "out"), objects)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(file["pairs"] for file in done.info["files"]) == 8 * parts
    return peak
