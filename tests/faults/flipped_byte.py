"""One byte of a stored artefact is changed on the disk: whoever wants to use it must notice before it is used.

Data set files, checkpoints, models and parts fail the job with ``corrupt_artifact``; an archive, a part's index and
an image fail the download; a damaged copy in a worker's cache is fetched anew.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
from fastapi.testclient import TestClient

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.records import Job, Model, Part, StoredFiles
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import merge_archives
from cffa_core.storage.base import ObjectInfo, checkpoint_key, result_key
from cffa_core.storage.manifest import fetch_files
from services.api.app import create_app
from services.client.download import fetch
from tests.api.driving import Worker
from tests.faults.campaign import Facts, Fault
from tests.faults.place import Place
from tests.faults.worlds import FaultWorld
from tests.worker.world import OWNER

PORT_URL = "http://127.0.0.1:8008"


def scenario(seed: int, place: Place) -> Facts:
    """One artefact, one random byte of it."""
    dice = random.Random(seed)
    name = list(ARTEFACTS)[seed % len(ARTEFACTS)]
    with place.world(lease_seconds=6.0) as world:
        ARTEFACTS[name](world, dice)
    return {"artefact": name}


def flip(path: Path, dice: random.Random) -> None:
    """Change one bit of one byte of a file."""
    raw = bytearray(path.read_bytes())
    position = dice.randrange(len(raw))
    raw[position] ^= 1 << dice.randrange(8)
    path.chmod(0o644)
    path.write_bytes(raw)


def flip_stored(world: FaultWorld, info: ObjectInfo, dice: random.Random) -> None:
    """Damage a stored object."""
    flip(world.settings.objects_dir / info.key, dice)


# --- inputs of jobs: the real worker and child ------------------------------------------------------------------------


def _dataset(world: FaultWorld, dice: random.Random) -> None:
    dataset = world.add_dataset()
    flip_stored(world, _any(dataset.stored, dice), dice)
    _must_refuse(world, world.training(dataset))


def _checkpoint(world: FaultWorld, dice: random.Random) -> None:
    """A checkpoint is verified against the record before it is looked at, so any bytes will do for one."""
    job = world.training(world.add_dataset())
    claim = world.store.claim("by hand", [Kind.TRAINING], lease_seconds=60)
    assert claim is not None
    files = {
        name: world.objects.put_bytes(checkpoint_key(job.id, 2, claim.attempt, name), dice.randbytes(1000))
        for name in ("optimizer.safetensors", "state.json")
    }
    world.store.add_checkpoint(claim, 2, StoredFiles(files))
    world.store.release(claim)
    flip_stored(world, _any(StoredFiles(files), dice), dice)
    _must_refuse(world, job)


def _model(world: FaultWorld, dice: random.Random) -> None:
    names = ("model.json", "adapters.safetensors")
    files = {name: world.objects.put_bytes(f"models/adopted/{name}", dice.randbytes(500)) for name in names}
    model_id = world.adopt_model(StoredFiles(files))
    flip_stored(world, _any(StoredFiles(files), dice), dice)
    _must_refuse(world, world.generation(model_id))


def _part(world: FaultWorld, dice: random.Random) -> None:
    job, parts = _generated(world)
    flip_stored(world, dice.choice(parts).stored.files["pairs.zip"], dice)
    _must_refuse(world, job)


def _trained(world: FaultWorld, dice: random.Random) -> None:
    """The product of training that the end of the job reads again."""
    job = world.training(world.add_dataset())
    claim = world.store.claim("by hand", [Kind.TRAINING], lease_seconds=60)
    assert claim is not None
    key = result_key(job.id, "train", claim.attempt, "model/model.json")
    info = world.objects.put_bytes(key, b'{"method": "dual_unet"}')
    world.store.commit(claim, StoredFiles({"model/model.json": info}), {})
    flip_stored(world, info, dice)
    _must_refuse(world, job)


def _cache(world: FaultWorld, dice: random.Random) -> None:
    """A worker's own copy of an input is damaged between two of its jobs."""
    dataset = world.add_dataset()
    worker = world.start_worker()
    world.wait_terminal(world.training(dataset, steps=2, preview_pairs=0).id)
    cached = sorted(path for path in (world.settings.scratch_dir / "cache" / "dataset").rglob("*") if path.is_file())
    flip(dice.choice(cached), dice)
    second = world.training(dataset, steps=2, preview_pairs=0)
    world.wait_terminal(second.id)
    world.assert_succeeded(second.id)
    for path in cached:
        info = dataset.stored.files[path.relative_to(path.parents[_depth(dataset.stored, path)]).as_posix()]
        world.objects.fetch(info, world.settings.home / "again")
        assert path.read_bytes() == (world.settings.home / "again").read_bytes()
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0


def _depth(stored: StoredFiles, path: Path) -> int:
    return next(n for n in range(4) if path.relative_to(path.parents[n]).as_posix() in stored.files)


# --- products: the real API and the client's download -----------------------------------------------------------------


def _archive(world: FaultWorld, dice: random.Random) -> None:
    job, parts = _generated(world)
    claim = world.store.claim("by hand", [Kind.GENERATION], lease_seconds=60)
    assert claim is not None and claim.kind is UnitKind.FINALIZE
    zips = []
    for part in parts:
        zips.append(world.settings.home / f"{part.index}.zip")
        world.objects.fetch(part.stored.files["pairs.zip"], zips[-1])
    merge_archives(zips, world.settings.home / "whole.zip", {})
    key = result_key(job.id, "finalize", claim.attempt, "archive.zip")
    info = world.objects.put_file(key, world.settings.home / "whole.zip")
    world.store.commit(claim, StoredFiles({"archive.zip": info}), {}, job_result={})
    flip_stored(world, info, dice)
    with TestClient(create_app(world.settings), base_url=PORT_URL) as client:
        whole = client.get(f"/v1/jobs/{job.id}/archives/all").raise_for_status().json()
        _must_not_arrive(client, whole, world.settings.home / "download.zip")


def _part_archive(world: FaultWorld, dice: random.Random) -> None:
    job, parts = _generated(world)
    part = dice.choice(parts)
    flip_stored(world, part.stored.files["pairs.zip"], dice)
    with TestClient(create_app(world.settings), base_url=PORT_URL) as client:
        listed = client.get(f"/v1/jobs/{job.id}/archives").raise_for_status().json()["parts"]
        _must_not_arrive(client, listed[part.index], world.settings.home / "download.zip")


def _index(world: FaultWorld, dice: random.Random) -> None:
    """A part's ``part.json`` says where its images are and which seeds they have."""
    job, parts = _generated(world)
    part = dice.choice(parts)
    flip_stored(world, part.stored.files["part.json"], dice)
    with TestClient(create_app(world.settings), base_url=PORT_URL, raise_server_exceptions=False) as client:
        _must_complain(client.get(f"/v1/jobs/{job.id}/pairs"))
        _must_complain(client.get(f"/v1/jobs/{job.id}/pairs/{part.info['pairs'][0]['index']}"))


def _image(world: FaultWorld, dice: random.Random) -> None:
    """An image is a byte range of its part's archive."""
    job, parts = _generated(world)
    part = dice.choice(parts)
    pair, modality = dice.choice(part.info["pairs"]), dice.choice(["cf", "fa"])
    path = world.settings.objects_dir / part.stored.files["pairs.zip"].key
    raw = bytearray(path.read_bytes())
    raw[pair[modality]["offset"] + dice.randrange(pair[modality]["size"])] ^= 1 << dice.randrange(8)
    path.chmod(0o644)
    path.write_bytes(raw)
    with TestClient(create_app(world.settings), base_url=PORT_URL, raise_server_exceptions=False) as client:
        _must_complain(client.get(f"/v1/jobs/{job.id}/pairs/{pair['index']}/{modality}.png"))


def _dataset_index(world: FaultWorld, dice: random.Random) -> None:
    dataset = world.add_dataset()
    flip_stored(world, dataset.stored.files["dataset.json"], dice)
    with TestClient(create_app(world.settings), base_url=PORT_URL, raise_server_exceptions=False) as client:
        _must_complain(client.get(f"/v1/datasets/{dataset.id}/pairs"))


def _model_by_hand(world: FaultWorld, dice: random.Random) -> None:
    """The library's own way to a model in the store."""
    files = {"model.json": world.objects.put_bytes("models/adopted/model.json", dice.randbytes(500))}
    model: Model = world.store.get_model(OWNER, world.adopt_model(StoredFiles(files)))
    flip_stored(world, files["model.json"], dice)
    try:
        fetch_files(world.objects, model.stored, world.settings.home / "model")
    except CorruptArtifact:
        assert not list((world.settings.home / "model").iterdir())
    else:
        raise AssertionError("a damaged model was fetched")


ARTEFACTS: dict[str, Callable[[FaultWorld, random.Random], None]] = {
    "data set file": _dataset,
    "checkpoint": _checkpoint,
    "model": _model,
    "part": _part,
    "product of training": _trained,
    "cached input": _cache,
    "archive": _archive,
    "archive of a part": _part_archive,
    "index of a part": _index,
    "image": _image,
    "index of a data set": _dataset_index,
    "model fetched by hand": _model_by_hand,
}


def _any(stored: StoredFiles, dice: random.Random) -> ObjectInfo:
    return stored.files[dice.choice(sorted(stored.files))]


def _generated(world: FaultWorld) -> tuple[Job, list[Part]]:
    """A generation job whose parts are done and which only has to be finished."""
    job = world.generation(world.adopt_model(), count=4, part_size=2)
    by_hand = Worker(world.store, world.objects, world.settings.home / "by-hand")
    for _ in range(2):
        by_hand.make_part()
    return job, world.store.parts(OWNER, job.id)


def _must_refuse(world: FaultWorld, job: Job) -> None:
    """The real worker must end the job with the right error, at the first attempt, and publish nothing."""
    before = {part.unit_id for part in world.store.parts(OWNER, job.id)}
    worker = world.start_worker()
    ended = world.wait_terminal(job.id)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert ended.state is JobState.FAILED, ended
    assert ended.error is not None and ended.error["code"] == "corrupt_artifact", ended.error
    assert {part.unit_id for part in world.store.parts(OWNER, job.id)} == before
    assert ended.result is None


def _must_not_arrive(client: TestClient, archive: dict[str, object], target: Path) -> None:
    try:
        fetch(
            client, lambda: str(archive["url"]), target, sha256=str(archive["sha256"]), size=int(str(archive["bytes"]))
        )
    except CorruptArtifact:
        assert not target.exists()
        assert not list(target.parent.glob("*.part"))
    else:
        raise AssertionError("a damaged archive was taken for whole")


def _must_complain(answer: httpx.Response) -> None:
    assert answer.status_code == 500, (answer.status_code, answer.headers.get("content-type"))
    assert answer.json()["code"] == "corrupt_artifact"


FAULT = Fault("flipped_byte", "one byte flipped in a stored artefact", 120, scenario, quick=(0, 3, 6, 8, 9, 10))
