"""Kill -9 of the child and of the whole worker, at seeded random points: the job goes on by itself, nothing is lost.

What a killed job leaves must be, byte for byte, what the same spec gives when it is run directly, in this process,
without service, worker or interruption. ``CFFA_FAULTS`` is the number of kills per kind of job (3 by default).
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Job, NewModel, StoredFiles
from cffa_core.jobs.spec import GenerateSettings, GenerationSpec, Kind, SamplerSpec, Scheduler, TrainSettings
from cffa_core.jobs.state import TERMINAL, JobState, UnitKind
from cffa_core.recipes.archive import merge_archives, verify_archive, write_part_archive
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.train import run_training
from cffa_core.storage.base import result_key
from cffa_core.storage.manifest import fetch_files, publish_folder
from tests.worker.world import OWNER, SIDE, World, child_pids

KILLS = 3
ROUNDS = max(1, int(os.environ.get("CFFA_FAULTS", str(KILLS))) // KILLS)
STEPS = 150
PAIRS = 29
CONTEXT = "reference"
PATIENCE = 240.0

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference runs in this process, with as many threads as the workers use."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def kill_at_random(world: World, job: Job, seed: int, mark: Callable[[], int], last: int) -> int:
    """Run ``job`` to its end with a worker that is restarted when killed; returns how many kills it took.

    A kill comes a random moment after ``mark()``, what the record counts as done, has passed a random value below
    ``last``. At least one kill is of the child alone and one of the worker.
    """
    dice = random.Random(seed)
    targets = ["child", "worker", dice.choice(["child", "worker"])]
    dice.shuffle(targets)
    points = sorted(dice.sample(range(1, last), KILLS))
    worker, done = world.start_worker(), 0
    for target, point in zip(targets, points, strict=True):
        world.wait(lambda point=point: mark() >= point or over(world, job), PATIENCE, f"mark {point}")
        time.sleep(dice.uniform(0, 0.1))
        if over(world, job):
            break
        victims = child_pids(worker.pid) if target == "child" else [worker.pid]
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
            done += 1
        if target == "worker":
            worker.wait()
            worker = world.start_worker()
    world.wait_terminal(job.id, PATIENCE)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    return done


def over(world: World, job: Job) -> bool:
    """Whether the job has ended."""
    return world.job(job.id).state in TERMINAL


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_nothing_unrecorded(world: World, job: Job) -> None:
    """What killed attempts stored and never committed is gone; what the record points to is there."""
    recorded = [part.stored for part in world.store.parts(OWNER, job.id)]
    recorded += [saved.stored for saved in world.store.checkpoints(OWNER, job.id)]
    keys = {info.key for stored in recorded for info in stored.files.values()}
    assert set(world.objects.list(f"jobs/{job.id}/")) == keys


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_killed_training_ends_bit_identical(world: World, tmp_path: Path, seed: int) -> None:
    dataset = world.add_dataset()
    job = world.training(
        dataset,
        steps=STEPS,
        checkpoint_every=5,
        validate_every=25,
        preview_every=100,
        ema_decay=0.9,
        seed=seed,
    )

    def newest_checkpoint() -> int:
        return max((saved.step for saved in world.store.checkpoints(OWNER, job.id)), default=0)

    kills = kill_at_random(world, job, seed, newest_checkpoint, STEPS // 2)
    finished = world.job(job.id)
    assert finished.state is JobState.SUCCEEDED, finished.error
    assert kills == KILLS

    folder = tmp_path / "dataset"
    fetch_files(world.objects, dataset.stored, folder)
    settings = TrainSettings.model_validate(job.spec.model_dump(exclude={"kind", "dataset_id"}))
    direct = tmp_path / "direct"
    run_training(
        settings, folder, "micro", direct, FolderContext(tmp_path / CONTEXT), models_dir=world.settings.models_dir
    )
    (train,) = world.store.parts(OWNER, job.id, kind=UnitKind.TRAIN)
    expected = {
        name.replace("best_checkpoint/", "model/", 1): digest
        for name, digest in digests(direct).items()
        if not name.startswith("latest_checkpoints/")
    }
    assert {name: info.sha256 for name, info in train.stored.files.items()} == expected
    assert [step for step, _ in world.store.metrics(OWNER, job.id, key="loss")] == list(range(1, STEPS + 1))
    claims = [event for event in world.events(job.id, "claimed") if event["unit"] == "train"]
    assert len(claims) <= 1 + kills
    assert_nothing_unrecorded(world, job)


def adopt_model(world: World, tmp_path: Path) -> str:
    """Train directly, and enter the model into the record as a finished job's; returns its id."""
    dataset = world.add_dataset()
    job = world.training(dataset, steps=4, preview_pairs=0)
    folder = tmp_path / "adopted" / "dataset"
    fetch_files(world.objects, dataset.stored, folder)
    settings = TrainSettings.model_validate(job.spec.model_dump(exclude={"kind", "dataset_id"}))
    out = tmp_path / "adopted" / "run"
    context = FolderContext(tmp_path / "adopted" / CONTEXT)
    card = run_training(settings, folder, "micro", out, context, models_dir=world.settings.models_dir)
    model = out / "best_checkpoint"
    stored = publish_folder(world.objects, model, lambda name: result_key(job.id, "train", 1, f"model/{name}"))
    for new in (None, NewModel(digest="1" * 64, card=card, stored=stored)):
        claim = world.store.claim("by hand", [Kind.TRAINING], lease_seconds=60)
        assert claim is not None
        finished = world.store.commit(claim, StoredFiles(), {}, model=new)
    assert finished.result is not None
    return str(finished.result["model_id"])


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_killed_generation_gives_the_same_archive(world: World, tmp_path: Path, seed: int) -> None:
    model_id = adopt_model(world, tmp_path)
    spec = GenerationSpec(
        model_id=model_id,
        resolution=SIDE,
        count=PAIRS,
        part_size=2,
        batch_size=2,
        sampler=SamplerSpec(scheduler=Scheduler.DDPM, steps=30),
        seed=seed,
    )
    job = world.post(spec)
    kills = kill_at_random(world, job, seed, lambda: world.job(job.id).counts.generated, PAIRS // 2)
    finished = world.job(job.id)
    assert finished.state is JobState.SUCCEEDED, finished.error
    assert kills == KILLS

    settings = GenerateSettings.model_validate(spec.model_dump(exclude={"kind", "model_id"}))
    header = {
        "spec": settings.model_dump(mode="json"),
        "model_digest": "1" * 64,
        "numerics_key": finished.numerics_key,
    }
    sampler = load_sampler(
        settings, tmp_path / "adopted" / "run" / "best_checkpoint", "micro", models_dir=world.settings.models_dir
    )
    zips = []
    for part in range(settings.parts):
        folder = tmp_path / "direct" / str(part)
        generate_part(sampler, settings, part, folder, FolderContext(tmp_path / CONTEXT))
        zips.append(tmp_path / "direct" / f"{part}.zip")
        write_part_archive(folder, zips[-1], header)
    merge_archives(zips, tmp_path / "direct.zip", header)
    (final,) = world.store.parts(OWNER, job.id, kind=UnitKind.FINALIZE)
    world.objects.fetch(final.stored.files["archive.zip"], tmp_path / "archive.zip")
    assert len(verify_archive(tmp_path / "archive.zip")["pairs"]) == PAIRS
    assert (tmp_path / "archive.zip").read_bytes() == (tmp_path / "direct.zip").read_bytes()

    parts = world.store.parts(OWNER, job.id, kind=UnitKind.PART)
    for part, direct in zip(parts, zips, strict=True):
        assert part.stored.files["pairs.zip"].sha256 == hashlib.sha256(direct.read_bytes()).hexdigest()
    assert sum(part.attempt - 1 for part in [*parts, final]) <= kills
    assert_nothing_unrecorded(world, job)
