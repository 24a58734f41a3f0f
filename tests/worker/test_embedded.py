"""The main job end to end in embedded mode: data set, training, generation, archive, with the child that computes."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cffa_core.jobs.records import Job
from cffa_core.jobs.spec import GenerateSettings, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import verify_archive
from cffa_core.storage.base import ObjectInfo
from tests.worker.world import OWNER, World


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[tuple[World, Job, Job]]:
    """One installation in which a training and a generation job were done by one worker process."""
    world = World(tmp_path_factory.mktemp("embedded") / "home", models_dir)
    try:
        dataset = world.add_dataset()
        worker = world.start_worker()
        trained = world.wait_terminal(world.training(dataset, steps=8).id)
        assert trained.state is JobState.SUCCEEDED, trained.error
        generated = world.wait_terminal(world.generation(trained.result["model_id"]).id)
        assert generated.state is JobState.SUCCEEDED, generated.error
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(10) == 0
        yield world, trained, generated
    finally:
        world.close()


def test_the_archive_holds_every_pair_and_verifies(made: tuple[World, Job, Job], tmp_path: Path) -> None:
    world, _, generated = made
    (final,) = world.store.parts(OWNER, generated.id, kind=UnitKind.FINALIZE)
    world.objects.fetch(final.stored.files["archive.zip"], tmp_path / "archive.zip")
    manifest = verify_archive(tmp_path / "archive.zip")
    assert [pair["index"] for pair in manifest["pairs"]] == [0, 1, 2, 3, 4]
    assert GenerateSettings.model_validate(manifest["spec"]).count == 5
    assert manifest["numerics_key"] == generated.numerics_key
    assert manifest["model_digest"] == world.store.get_model(OWNER, generated.spec.model_id).digest
    text = json.dumps(manifest)
    assert not any(name in text for name in (generated.id, generated.spec.model_id, OWNER, str(world.settings.home)))


def test_the_result_names_the_archives_digest(made: tuple[World, Job, Job]) -> None:
    world, _, generated = made
    (final,) = world.store.parts(OWNER, generated.id, kind=UnitKind.FINALIZE)
    raw = world.objects.get_bytes(final.stored.files["archive.zip"].key)
    assert generated.result["archive"] == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest = json.loads(world.objects.get_bytes(final.stored.files["manifest.json"].key))
    assert manifest["archive"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert [part["name"] for part in manifest["parts"]] == ["00000", "00001", "00002"]


def test_every_pair_is_a_byte_range_of_its_parts_archive(made: tuple[World, Job, Job]) -> None:
    world, _, generated = made
    parts = world.store.parts(OWNER, generated.id, kind=UnitKind.PART)
    found = []
    for part in parts:
        assert set(part.stored.files) == {"pairs.zip", "part.json"}
        raw = world.objects.get_bytes(part.stored.files["pairs.zip"].key)
        for pair in json.loads(world.objects.get_bytes(part.stored.files["part.json"].key))["pairs"]:
            found.append(pair["index"])
            for modality in ("cf", "fa"):
                entry = pair[modality]
                image = raw[entry["offset"] : entry["offset"] + entry["size"]]
                assert image.startswith(b"\x89PNG")
                assert hashlib.sha256(image).hexdigest() == entry["sha256"]
    assert found == [0, 1, 2, 3, 4]
    assert generated.counts.generated == 5


def test_training_leaves_a_model_logs_and_previews(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    (train,) = world.store.parts(OWNER, trained.id, kind=UnitKind.TRAIN)
    names = set(train.stored.files)
    assert {"training_log.txt", "training_log.jsonl", "validation_log.txt", "validation_log.jsonl"} <= names
    assert any(name.startswith("step_000006_random_pairs/") for name in names)
    model = world.store.get_model(OWNER, trained.result["model_id"])
    assert set(model.stored.files) == {"model.json", "lora_cf.safetensors", "lora_fa.safetensors"}
    assert model.card["base"]["name"] == "micro"
    assert model.card["digest"] == model.digest == trained.result["model_digest"]


def test_the_training_manifest_lists_every_product(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    (final,) = world.store.parts(OWNER, trained.id, kind=UnitKind.FINALIZE)
    (train,) = world.store.parts(OWNER, trained.id, kind=UnitKind.TRAIN)
    text = world.objects.get_bytes(final.stored.files["manifest.json"].key).decode()
    listed = json.loads(text)["files"]
    assert {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()} == {
        name: (info.size, info.sha256) for name, info in train.stored.files.items()
    }
    assert trained.id not in text
    assert trained.spec.dataset_id not in text


def test_metrics_of_every_step_are_recorded(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    loss = [(step, values["loss"]) for step, values in world.store.metrics(OWNER, trained.id, key="loss")]
    (train,) = world.store.parts(OWNER, trained.id, kind=UnitKind.TRAIN)
    log = world.objects.get_bytes(train.stored.files["training_log.jsonl"].key).decode().splitlines()
    assert loss == [(line["step"], line["loss"]) for line in map(json.loads, log)]
    assert [step for step, _ in loss] == list(range(1, 9))


def test_only_the_recorded_checkpoints_stay_in_the_object_store(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    recorded = world.store.checkpoints(OWNER, trained.id)
    assert [saved.step for saved in recorded] == [4, 6, 8]
    keys = {info.key for saved in recorded for info in saved.stored.files.values()}
    assert set(world.objects.list(f"jobs/{trained.id}/checkpoints/")) == keys


def test_the_worker_leaves_nothing_but_the_cache_behind(made: tuple[World, Job, Job]) -> None:
    world, _, _ = made
    assert list((world.settings.scratch_dir / "workers").iterdir()) == []
    cached = sorted(path.name for path in (world.settings.scratch_dir / "cache").iterdir())
    assert cached == ["dataset", "model", "novelty"]


@contextmanager
def flipped(world: World, info: ObjectInfo) -> Iterator[None]:
    """One byte of a stored object is another one, behind the store's back; nothing is cached."""
    shutil.rmtree(world.settings.scratch_dir / "cache", ignore_errors=True)
    path = world.settings.objects_dir / info.key
    whole = path.read_bytes()
    flip(path)
    try:
        yield
    finally:
        path.write_bytes(whole)


def flip(path: Path) -> None:
    """Change one byte in the middle of a stored object."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(whole)


def fails_as_corrupt(world: World, job: Job) -> bool:
    """Whether a worker fails the job for damaged bytes, at the first attempt and without a crash."""
    with world.worker_thread():
        failed = world.wait_terminal(job.id)
    assert failed.state is JobState.FAILED
    assert world.events(job.id, "crashed") == []
    return failed.error is not None and failed.error["code"] == "corrupt_artifact"


def test_a_flipped_byte_of_a_data_set_is_found_before_it_is_used(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    dataset = world.store.get_dataset(OWNER, trained.spec.dataset_id)
    with flipped(world, dataset.stored.files["fa/p1.png"]):
        assert fails_as_corrupt(world, world.training(dataset))


def test_a_flipped_byte_of_a_model_is_found_before_it_is_used(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    model = world.store.get_model(OWNER, trained.result["model_id"])
    with flipped(world, model.stored.files["lora_fa.safetensors"]):
        assert fails_as_corrupt(world, world.generation(model.id))


def test_a_flipped_byte_of_a_part_is_found_before_it_is_archived(made: tuple[World, Job, Job]) -> None:
    world, trained, generated = made
    job = world.generation(trained.result["model_id"])
    parts = world.store.parts(OWNER, generated.id, kind=UnitKind.PART)
    for part in parts:
        claim = world.store.claim("by hand", [Kind.GENERATION], lease_seconds=60)
        assert claim is not None
        world.store.commit(claim, part.stored, part.info)
    with flipped(world, parts[1].stored.files["pairs.zip"]):
        assert fails_as_corrupt(world, job)
    assert list(world.objects.list(f"jobs/{job.id}/")) == []


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before_it(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    dataset = world.store.get_dataset(OWNER, trained.spec.dataset_id)
    job = world.training(dataset, steps=100_000, checkpoint_every=2, validate_every=1000, preview_every=100_000)

    def steps() -> list[int]:
        return [event["step"] for event in world.events(job.id, "checkpoint")]

    with world.worker_thread():
        world.wait(lambda: len(steps()) >= 2)
        world.store.pause_job(OWNER, job.id)
        world.wait_state(job.id, JobState.PAUSED, world.settings.cancel_grace_seconds)
        before = steps()
        newest = world.store.checkpoints(OWNER, job.id)[-1]
        flip(world.settings.objects_dir / next(iter(newest.stored.files.values())).key)
        world.store.resume_job(OWNER, job.id)
        world.wait(lambda: len(steps()) > len(before) + 1)
        world.store.cancel_job(OWNER, job.id)
        world.wait_state(job.id, JobState.CANCELED, world.settings.cancel_grace_seconds)
    assert newest.step == before[-1]
    assert steps()[len(before) : len(before) + 2] == [newest.step, newest.step + 2]
    for saved in world.store.checkpoints(OWNER, job.id):
        for info in saved.stored.files.values():
            assert hashlib.sha256(world.objects.get_bytes(info.key)).hexdigest() == info.sha256


def test_pause_resume_and_cancel_of_a_training_keep_its_checkpoints(made: tuple[World, Job, Job]) -> None:
    world, trained, _ = made
    dataset = world.store.get_dataset(OWNER, trained.spec.dataset_id)
    job = world.training(dataset, steps=100_000, checkpoint_every=2, validate_every=1000, preview_every=100_000)

    def newest() -> int:
        return max((saved.step for saved in world.store.checkpoints(OWNER, job.id)), default=0)

    with world.worker_thread():
        world.wait(lambda: newest() >= 4)
        world.store.pause_job(OWNER, job.id)
        world.wait_state(job.id, JobState.PAUSED, world.settings.cancel_grace_seconds)
        kept = newest()
        world.store.resume_job(OWNER, job.id)
        world.wait(lambda: newest() > kept + 2)
        world.store.cancel_job(OWNER, job.id)
        world.wait_state(job.id, JobState.CANCELED, world.settings.cancel_grace_seconds)
    assert [event["step"] for event in world.events(job.id, "checkpoint")] == list(range(2, newest() + 1, 2))
    saved = world.store.checkpoints(OWNER, job.id)
    assert len(saved) == 3
    for info in saved[-1].stored.files.values():
        assert hashlib.sha256(world.objects.get_bytes(info.key)).hexdigest() == info.sha256
