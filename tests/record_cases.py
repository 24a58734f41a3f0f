"""Ready-made rows for tests of the record: a data set, a trained model, jobs, and a claim that must exist."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from cffa_core.jobs.records import Claim, Job, NewModel, StoredFiles
from cffa_core.jobs.spec import EvaluationSpec, GenerationSpec, Kind, TrainingSpec
from cffa_core.jobs.store import JobStore
from cffa_core.storage.base import ObjectInfo

OWNER = "clinic-a"
OTHER = "clinic-b"
ALL_KINDS = tuple(Kind)
LEASE = 30.0


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where the system has one: most tests need no power cut survived."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        yield Path(folder)


@cache
def _empty_record() -> bytes:
    """The bytes of a migrated record without rows; the migrations run once per test process."""
    with memory_folder() as folder:
        store = JobStore(f"sqlite:///{folder / 'record.sqlite'}")
        store.migrate()
        store.close()
        return (folder / "record.sqlite").read_bytes()


def sqlite_store(folder: Path) -> JobStore:
    """A migrated record in a file below ``folder``."""
    (folder / "record.sqlite").write_bytes(_empty_record())
    return JobStore(f"sqlite:///{folder / 'record.sqlite'}")


def files(*keys: str) -> StoredFiles:
    """Stored files whose names are the last part of their keys."""
    return StoredFiles({key.rsplit("/", 1)[-1]: ObjectInfo(key, 3, "ab" * 32) for key in keys})


def add_dataset(store: JobStore, owner: str = OWNER) -> str:
    """A data set of ``owner``; returns its id."""
    dataset_id = store.new_id("ds")
    store.add_dataset(
        owner,
        dataset_id=dataset_id,
        name="retinas",
        digest="0" * 64,
        pairs=4,
        report={"pairs": 4},
        stored=files(f"datasets/{dataset_id}/dataset.json"),
    )
    return dataset_id


def training_job(store: JobStore, owner: str = OWNER, **options: Any) -> Job:
    """A queued training job on a data set of its own."""
    job, created = store.create_job(owner, TrainingSpec(dataset_id=add_dataset(store, owner), steps=100), **options)
    assert created
    return job


def claimed(store: JobStore, worker: str = "w", **options: Any) -> Claim:
    """The next claim, which must exist."""
    claim = store.claim(worker, ALL_KINDS, lease_seconds=options.pop("lease_seconds", LEASE), **options)
    assert claim is not None
    return claim


def trained_model(store: JobStore, owner: str = OWNER) -> str:
    """Run a training job through to its model; returns the model's id. Nothing else of ``owner`` may wait."""
    job = training_job(store, owner)
    store.commit(claimed(store), files(f"jobs/{job.id}/train/a1/model/model.json"), {})
    done = store.commit(
        claimed(store),
        files(f"jobs/{job.id}/finalize/a1/manifest.json"),
        {},
        job_result={"steps": 100},
        model=NewModel("1" * 64, {"base": "tiny"}, files(f"jobs/{job.id}/train/a1/model/model.json")),
    )
    assert done.result is not None
    return str(done.result["model_id"])


def generation_job(store: JobStore, model_id: str, owner: str = OWNER, *, parts: int = 2, **options: Any) -> Job:
    """A queued generation job of ``parts`` parts with four pairs each."""
    spec = GenerationSpec(model_id=model_id, count=4 * parts, part_size=4)
    job, created = store.create_job(owner, spec, **options)
    assert created
    return job


def generated_pairs(store: JobStore, model_id: str, owner: str = OWNER, *, parts: int = 1) -> str:
    """Run a generation job through; returns its id. Nothing else of ``owner`` may wait."""
    job = generation_job(store, model_id, owner, parts=parts)
    for _ in range(parts):
        commit_part(store, claimed(store))
    manifest = files(f"jobs/{job.id}/finalize/a1/archive.zip")
    store.commit(claimed(store), manifest, {}, job_result={"manifest": {"sha256": "2" * 64}})
    return job.id


def evaluation_job(store: JobStore, owner: str = OWNER, **fields: Any) -> Job:
    """A queued evaluation of one data set against another, unless ``fields`` of its spec say otherwise."""
    if "generation_job_id" not in fields:
        fields.setdefault("pairs_dataset_id", add_dataset(store, owner))
    fields.setdefault("reference_dataset_id", add_dataset(store, owner))
    job, created = store.create_job(owner, EvaluationSpec(**fields))
    assert created
    return job


def part_info(claim: Claim) -> dict[str, Any]:
    """What a recipe reports for the claimed part, as far as the record looks at it."""
    assert isinstance(claim.spec, GenerationSpec)
    return {"pairs": [{"index": index} for index in claim.spec.part_range(claim.index)]}


def commit_part(store: JobStore, claim: Claim) -> Job:
    """Commit the claimed part as a worker would."""
    key = f"jobs/{claim.job_id}/parts/{claim.index:05d}/a{claim.attempt}"
    return store.commit(claim, files(f"{key}/pairs.zip", f"{key}/part.json"), part_info(claim))


def expire(store: JobStore, claim: Claim) -> None:
    """Let a lease run out now, as if its worker had fallen silent."""
    store.renew(claim, -1.0)
