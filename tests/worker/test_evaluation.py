"""Evaluation jobs end to end with the child that computes: inputs, report, manifest, damage, sudden death, cancel."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.data.dataset_folder import read_index
from cffa_core.jobs.records import Dataset, Job, Part
from cffa_core.jobs.spec import EvaluationSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.storage.manifest import read_verified
from services.worker.generated_pairs import fetch_pairs
from services.worker.orders import order_for
from services.worker.scratch import Scratch
from tests.worker.scripted_child import Act
from tests.worker.world import OWNER, World, child_pids, scripted

# One installation for the whole file, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("evaluation jobs")

PAIRS = 5


def post(world: World, **fields: Any) -> Job:
    """A small evaluation through the micro base."""
    return world.post(EvaluationSpec(**({"base": "micro"} | fields)))


def report_of(world: World, job: Job) -> tuple[Part, dict[str, Any]]:
    """The unit that measured, and its report."""
    (unit,) = world.store.parts(OWNER, job.id, kind=UnitKind.EVALUATE)
    return unit, json.loads(read_verified(world.objects, unit.stored.files["report.json"]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[World]:
    """One installation for this module."""
    world = World(tmp_path_factory.mktemp("evaluation") / "home", models_dir)
    yield world
    world.close()


@pytest.fixture(scope="module")
def made(world: World) -> tuple[Dataset, Dataset, Job]:
    """Training data, other real pairs, and a generation job that was done."""
    learnt, held_out = world.add_dataset(), world.add_dataset(count=6)
    with world.worker_thread():
        trained = world.wait_terminal(world.training(learnt, steps=2, preview_pairs=0).id)
        assert trained.result is not None, trained.error
        generated = world.wait_terminal(world.generation(trained.result["model_id"]).id)
        assert generated.state is JobState.SUCCEEDED, generated.error
    return learnt, held_out, generated


@pytest.fixture(scope="module")
def evaluated(world: World, made: tuple[Dataset, Dataset, Job]) -> Job:
    """The generated pairs, measured."""
    job = post(world, generation_job_id=made[2].id, reference_dataset_id=made[1].id)
    with world.worker_thread():
        done = world.wait_terminal(job.id)
    assert done.state is JobState.SUCCEEDED, done.error
    return done


def test_the_report_is_of_the_pairs_of_the_job(
    world: World, made: tuple[Dataset, Dataset, Job], evaluated: Job
) -> None:
    learnt, held_out, _ = made
    unit, report = report_of(world, evaluated)
    assert report["format"] == "cffa-evaluation/1"
    assert report["pairs"]["pairs"] == PAIRS
    assert [pair["name"] for pair in report["alignment"]["per_pair"]] == [f"{index:06d}" for index in range(PAIRS)]
    assert (report["reference"]["digest"], report["reference"]["pairs"]) == (held_out.digest, 6)
    assert (report["train"]["digest"], report["train"]["pairs"]) == (learnt.digest, 4)
    assert [report[role]["source"] for role in ("pairs", "reference", "train")] == ["pairs", "reference", "train"]
    names = set(unit.stored.files)
    assert {"report.json", "report.md", "alignment.png", "pairs.png", "neighbours.png"} <= names
    for name, info in unit.stored.files.items():
        data = read_verified(world.objects, info)
        assert not name.endswith(".png") or data.startswith(b"\x89PNG")
        assert str(world.settings.home).encode() not in data


def test_the_manifest_names_what_was_measured(world: World, made: tuple[Dataset, Dataset, Job], evaluated: Job) -> None:
    learnt, held_out, generated = made
    unit, _ = report_of(world, evaluated)
    (final,) = world.store.parts(OWNER, evaluated.id, kind=UnitKind.FINALIZE)
    raw = read_verified(world.objects, final.stored.files["manifest.json"])
    manifest = json.loads(raw)
    assert {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()} == {
        name: (info.size, info.sha256) for name, info in unit.stored.files.items()
    }
    assert generated.result is not None and evaluated.result is not None
    assert manifest["sets"] == {
        "pairs": {"name": "generated", "digest": generated.result["manifest"]["sha256"], "pairs": PAIRS},
        "reference": {"name": held_out.name, "digest": held_out.digest, "pairs": 6},
        "train": {"name": learnt.name, "digest": learnt.digest, "pairs": 4},
    }
    assert manifest["numerics_key"] == evaluated.numerics_key
    assert evaluated.result["manifest"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert evaluated.result["report"] == manifest["files"]["report.json"]
    assert not any(id_ in raw.decode() for id_ in (evaluated.id, generated.id, learnt.id, held_out.id))


def test_of_a_large_job_only_the_chosen_pairs_are_fetched(
    world: World, made: tuple[Dataset, Dataset, Job], tmp_path: Path
) -> None:
    _, held_out, generated = made
    scratch = Scratch(tmp_path, "by hand")
    chosen = {}
    told: list[tuple[int, int]] = []

    def on_pair(done: int, total: int) -> None:
        told.append((done, total))

    for number, seed in enumerate((1, 1, 2)):
        job = post(world, generation_job_id=generated.id, reference_dataset_id=held_out.id, max_pairs=2, seed=seed)
        claim = world.store.claim("by hand", [Kind.EVALUATION], lease_seconds=60)
        assert claim is not None and claim.job_id == job.id
        order = order_for(world.store, world.settings, scratch, claim)
        world.store.fail(claim, "by_hand", "only its order was wanted")
        indices = order.facts["indices"]
        assert len(set(indices)) == 2 and chosen.setdefault(seed, indices) == indices
        parts = {name.partition("/")[0] for name in order.inputs["pairs"].files}
        assert parts == {f"{index // 2:05d}" for index in indices}
        told.clear()
        folder = fetch_pairs(world.objects, order.inputs["pairs"], indices, tmp_path / str(number), on_pair)
        assert told == [(1, 2), (2, 2)]
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
        assert names == [f"{modality}/{index:06d}.png" for modality in ("cf", "fa") for index in sorted(indices)]
    assert chosen[1] != chosen[2]
    scratch.close()


def test_a_flipped_byte_of_a_generated_image_is_found(world: World, made: tuple[Dataset, Dataset, Job]) -> None:
    _, held_out, generated = made
    part = world.store.parts(OWNER, generated.id, kind=UnitKind.PART)[1]
    path = world.settings.objects_dir / part.stored.files["pairs.zip"].key
    index = json.loads(read_verified(world.objects, part.stored.files["part.json"]))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[index["pairs"][0]["fa"]["offset"] + 40] ^= 1
    path.chmod(0o644)
    path.write_bytes(damaged)
    try:
        job = post(world, generation_job_id=generated.id, reference_dataset_id=held_out.id)
        with world.worker_thread():
            failed = world.wait_terminal(job.id)
    finally:
        path.write_bytes(whole)
    assert failed.state is JobState.FAILED
    assert failed.error is not None and failed.error["code"] == "corrupt_artifact"
    assert "fa/000002.png" in failed.error["message"]


def test_a_transformer_that_is_not_there_fails_the_job_with_what_to_do(
    world: World, made: tuple[Dataset, Dataset, Job]
) -> None:
    learnt, held_out, _ = made
    job = post(
        world,
        pairs_dataset_id=learnt.id,
        reference_dataset_id=held_out.id,
        extractor="vit",
        extractor_model="dinov2-small",
    )
    with world.worker_thread():
        failed = world.wait_terminal(job.id)
    assert failed.error is not None and failed.error["code"] == "model_unavailable"
    assert "dinov2-small" in failed.error["message"]


def test_a_killed_child_repeats_the_unit(world: World, made: tuple[Dataset, Dataset, Job]) -> None:
    learnt, held_out, _ = made
    job = post(world, pairs_dataset_id=learnt.id, reference_dataset_id=held_out.id, base=None)
    worker = world.start_worker()
    # It tells its numerics key once it has its libraries; what follows is the job's own.
    world.wait(lambda: world.events(job.id, "numerics"))
    (child,) = child_pids(worker.pid)
    os.kill(child, signal.SIGKILL)
    done = world.wait_terminal(job.id)
    assert done.state is JobState.SUCCEEDED, done.error
    assert [crash["attempt"] for crash in world.events(job.id, "crashed")] == [1]
    unit, report = report_of(world, done)
    assert unit.attempt == 2
    assert report["pairs"]["digest"] == learnt.digest and report["train"] is None
    keys = [info.key for info in unit.stored.files.values()]
    assert sorted(world.objects.list(f"jobs/{job.id}/evaluate/")) == sorted(keys)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(10) == 0


def test_cancel_stops_an_evaluation_at_its_next_sign_of_life(world: World) -> None:
    job = post(
        world,
        pairs_dataset_id=world.add_unread_dataset().id,
        reference_dataset_id=world.add_unread_dataset().id,
        seed=int(Act.WAIT_FOR_STOP),
    )
    with world.worker_thread(scripted()):
        world.wait(lambda: world.job(job.id).progress.current > 0)
        assert world.store.cancel_job(OWNER, job.id).state is JobState.CANCELING
        world.wait_state(job.id, JobState.CANCELED)
    assert world.store.parts(OWNER, job.id) == []
    assert world.store.list_jobs(OWNER, kind=Kind.EVALUATION, state=JobState.CANCELED).items[0].id == job.id


def test_data_sets_share_the_cache_with_training(world: World, evaluated: Job) -> None:
    cache = world.settings.scratch_dir / "cache"
    assert sorted(path.name for path in cache.iterdir()) == ["dataset", "model", "novelty"]
    assert {read_index(folder)[0] for folder in (cache / "dataset").iterdir()} >= {
        world.store.get_dataset(OWNER, evaluated.spec.reference_dataset_id).digest
    }
