"""Orphaned objects are removed; whatever is or may yet be pointed to is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cffa_core.jobs.records import Claim, NewModel, StoredFiles
from cffa_core.jobs.store import JobStore
from cffa_core.jobs.sweep import orphans
from cffa_core.storage.base import checkpoint_key, part_key, result_key
from cffa_core.storage.local import LocalStore
from tests.record_cases import (
    OWNER,
    claimed,
    expire,
    generation_job,
    memory_folder,
    part_info,
    sqlite_store,
    trained_model,
    training_job,
)


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def store(folder: Path) -> Iterator[JobStore]:
    opened = sqlite_store(folder)
    yield opened
    opened.close()


@pytest.fixture
def objects(folder: Path) -> LocalStore:
    return LocalStore(folder / "objects", secret=b"k", base_url="http://x")


def put_part(objects: LocalStore, claim: Claim) -> StoredFiles:
    key = part_key(claim.job_id, claim.index, claim.attempt, "pairs.zip")
    return StoredFiles({"pairs.zip": objects.put_bytes(key, b"zip")})


def test_files_of_a_lost_attempt_go_and_those_of_the_live_one_stay(store: JobStore, objects: LocalStore) -> None:
    generation_job(store, trained_model(store), parts=1)
    lost = claimed(store)
    put_part(objects, lost)
    assert orphans(store, objects) == 0
    expire(store, lost)
    store.sweep()
    live = claimed(store)
    put_part(objects, live)
    assert orphans(store, objects) == 1
    assert list(objects.list("")) == [part_key(live.job_id, 0, 2, "pairs.zip")]


def test_files_of_an_attempt_that_ended_without_commit_go(store: JobStore, objects: LocalStore) -> None:
    generation_job(store, trained_model(store), parts=1)
    claim = claimed(store)
    put_part(objects, claim)
    store.release(claim)
    assert orphans(store, objects) == 1


def test_committed_files_stay_and_uncommitted_ones_beside_them_go(store: JobStore, objects: LocalStore) -> None:
    generation_job(store, trained_model(store), parts=1)
    claim = claimed(store)
    stored = put_part(objects, claim)
    objects.put_bytes(part_key(claim.job_id, 0, 1, "rest.tmp"), b"x")
    store.commit(claim, stored, part_info(claim))
    assert orphans(store, objects) == 1
    assert list(objects.list("")) == [part_key(claim.job_id, 0, 1, "pairs.zip")]


def test_recorded_checkpoints_stay_and_superseded_ones_go(store: JobStore, objects: LocalStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    for step in (1, 2, 3, 4):
        info = objects.put_bytes(checkpoint_key(job.id, step, claim.attempt, "state"), b"x")
        store.add_checkpoint(claim, step, StoredFiles({"state": info}))
    store.release(claim)
    assert orphans(store, objects) == 1
    assert list(objects.list("")) == [checkpoint_key(job.id, step, 1, "state") for step in (2, 3, 4)]


def test_results_go_by_the_kind_or_the_id_of_their_unit(store: JobStore, objects: LocalStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    objects.put_bytes(result_key(job.id, "train", 1, "log.txt"), b"x")
    objects.put_bytes(result_key(job.id, claim.unit_id, 1, "log.txt"), b"x")
    objects.put_bytes(result_key(job.id, "unknown", 1, "log.txt"), b"x")
    assert orphans(store, objects) == 0
    store.release(claim)
    assert orphans(store, objects) == 2
    assert list(objects.list("")) == [result_key(job.id, "unknown", 1, "log.txt")]


def test_a_deleted_job_leaves_only_its_models_files(store: JobStore, objects: LocalStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    model = StoredFiles({"m": objects.put_bytes(result_key(job.id, "train", 1, "model/m"), b"m")})
    log = StoredFiles({"log": objects.put_bytes(result_key(job.id, "train", 1, "log"), b"l")})
    store.commit(claim, StoredFiles({**model.files, **log.files}), {})
    store.commit(claimed(store), StoredFiles(), {}, model=NewModel("0" * 64, {}, model))
    objects.put_bytes("datasets/ds_x/cf/a.png", b"x")
    store.delete_job(OWNER, job.id)
    assert orphans(store, objects) == 1
    assert list(objects.list("")) == ["datasets/ds_x/cf/a.png", result_key(job.id, "train", 1, "model/m")]
