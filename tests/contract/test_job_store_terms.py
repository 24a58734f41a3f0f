"""Deadlines, retention and wishes on each database, by the database's clock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from cffa_core.errors import Conflict, Expired, InvalidSpec, LeaseLost, NotFound
from cffa_core.jobs import sweep
from cffa_core.jobs.records import JobFilter, NewModel, StoredFiles, Terms
from cffa_core.jobs.schema import jobs
from cffa_core.jobs.spec import EvaluationSpec, TrainingSpec
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.storage.base import checkpoint_key, part_key
from cffa_core.storage.local import LocalStore
from tests.record_cases import (
    LEASE,
    OTHER,
    OWNER,
    add_dataset,
    claimed,
    commit_part,
    evaluation_job,
    files,
    generated_pairs,
    generation_job,
    trained_model,
    training_job,
)

SOON = 0.05
KILLED_BETWEEN = """
import os, signal, sys
from cffa_core.jobs.store import JobStore
store = JobStore(sys.argv[1])
(job_id,) = store.expirable()
keys = store.expire_job(job_id)
assert len(keys) == 4, keys
os.kill(os.getpid(), signal.SIGKILL)
"""


def soon(what: Callable[[], object]) -> object:
    """Wait for something that a time of the database brings."""
    end = time.monotonic() + 10.0
    while not (found := what()):
        assert time.monotonic() < end, "did not happen within 10 s"
        time.sleep(0.02)
    return found


def local(folder: Path) -> LocalStore:
    return LocalStore(folder / "objects", secret=b"k" * 32, base_url="http://x")


# --- deadlines ------------------------------------------------------------------------------------------------------


def test_a_job_that_is_not_over_at_its_deadline_fails_and_keeps_what_is_done(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=3, asked=Terms(deadline_seconds=0.4))
    assert job.deadline_at is not None
    assert 0.3 < (job.deadline_at - job.created_at).total_seconds() < 0.5
    store.sweep()
    assert store.get_job(OWNER, job.id).state is JobState.QUEUED
    commit_part(store, claimed(store))
    held = claimed(store)

    def failed() -> bool:
        store.sweep()
        return store.get_job(OWNER, job.id).state is JobState.FAILED

    soon(failed)
    late = store.get_job(OWNER, job.id)
    assert late.error is not None and late.error["code"] == late.reason == "deadline_exceeded"
    assert len(store.parts(OWNER, job.id, kind=UnitKind.PART)) == 1
    assert store.renew(held, LEASE) == "cancel"
    with pytest.raises(LeaseLost):
        commit_part(store, held)
    assert store.claim("w", [job.kind], lease_seconds=LEASE) is None
    again = store.retry_job(OWNER, job.id)
    assert again.deadline_at is None and again.error is None
    store.sweep()
    assert store.get_job(OWNER, job.id).state is JobState.RUNNING


@pytest.mark.parametrize("held", ["queued", "paused", "finalizing"])
def test_a_deadline_ends_jobs_that_nobody_works_on(store: JobStore, held: str) -> None:
    job = generation_job(store, trained_model(store), parts=1, asked=Terms(deadline_seconds=0.3))
    if held == "paused":
        store.pause_job(OWNER, job.id)
    if held == "finalizing":
        commit_part(store, claimed(store))
    assert store.get_job(OWNER, job.id).state.value == held

    def failed() -> bool:
        store.sweep()
        return store.get_job(OWNER, job.id).state is JobState.FAILED

    soon(failed)
    assert store.load().units.keys() and not any(store.load().units.values())


def test_a_job_that_is_over_in_time_has_no_deadline_to_fear(store: JobStore) -> None:
    generated = trained_model(store)
    job = generation_job(store, generated, parts=1, asked=Terms(deadline_seconds=0.3))
    commit_part(store, claimed(store))
    store.commit(claimed(store), files("archive.zip"), {}, job_result={})
    time.sleep(0.35)
    store.sweep()
    assert store.get_job(OWNER, job.id).state is JobState.SUCCEEDED


def test_a_deadline_is_a_time_to_come_and_given_once(store: JobStore) -> None:
    spec = TrainingSpec(dataset_id=add_dataset(store), steps=10)
    now = datetime.now(UTC)
    for terms, code in (
        (Terms(deadline_at=now - timedelta(hours=1)), "in_the_past"),
        (Terms(deadline_at=now + timedelta(hours=1), deadline_seconds=5.0), "given_twice"),
        (Terms(deadline_at=datetime(9999, 12, 31, 23, tzinfo=timezone(-timedelta(hours=20)))), "too_far"),
    ):
        with pytest.raises(InvalidSpec) as refused:
            store.create_job(OWNER, spec, asked=terms)
        assert [(found.pointer, found.code) for found in refused.value.problems] == [("/deadline_at", code)]
    job, _ = store.create_job(OWNER, spec, asked=Terms(deadline_at=now + timedelta(hours=1)))
    assert job.deadline_at is not None and abs(job.deadline_at - now - timedelta(hours=1)) < timedelta(seconds=1)


def test_terms_belong_to_the_body_that_a_key_replays(store: JobStore) -> None:
    spec = TrainingSpec(dataset_id=add_dataset(store), steps=10)
    first, _ = store.create_job(OWNER, spec, idempotency_key="k", asked=Terms(deadline_seconds=50.0))
    again, created = store.create_job(OWNER, spec, idempotency_key="k", asked=Terms(deadline_seconds=50.0))
    assert (again.id, again.deadline_at, created) == (first.id, first.deadline_at, False)
    with pytest.raises(Conflict):
        store.create_job(OWNER, spec, idempotency_key="k")


# --- retention ------------------------------------------------------------------------------------------------------


def test_products_expire_after_their_time_and_the_history_stays(store: JobStore, folder: Path) -> None:
    objects = local(folder)
    job = generation_job(store, trained_model(store), parts=1, asked=Terms(retention_seconds=SOON))
    assert job.expires_at is None
    claim = claimed(store)
    names = {n: objects.put_bytes(part_key(job.id, 0, claim.attempt, n), b"x") for n in ("pairs.zip", "part.json")}
    store.commit(claim, StoredFiles(names), {"pairs": [{"index": 0}]})
    done = store.commit(claimed(store), StoredFiles({}), {}, job_result={"pairs": 4})
    assert done.expires_at is not None
    before = len(store.events(OWNER, job.id))
    soon(lambda: sweep.expired(store, objects))
    expired = store.get_job(OWNER, job.id)
    assert expired.state is JobState.EXPIRED and expired.result == {"pairs": 4} and expired.counts.generated == 1
    assert list(objects.list("")) == [] and store.parts(OWNER, job.id) == []
    assert len(store.events(OWNER, job.id)) == before + 1
    assert sweep.expired(store, objects) == 0
    with pytest.raises(Expired):
        store.retry_job(OWNER, job.id)
    with pytest.raises(InvalidSpec) as refused:
        store.create_job(OWNER, EvaluationSpec(generation_job_id=job.id, reference_dataset_id=add_dataset(store)))
    assert [found.code for found in refused.value.problems] == ["expired"]
    assert store.delete_job(OWNER, job.id) == ()
    with pytest.raises(NotFound):
        store.get_job(OWNER, job.id)


def test_the_service_decides_for_jobs_that_say_nothing(record_url: str) -> None:
    store = JobStore(record_url, retention_seconds=1000.0)
    model = trained_model(store)
    usual, own, kept = (
        generation_job(store, model, parts=1, asked=asked)
        for asked in (Terms(), Terms(retention_seconds=5.0), Terms(retention_seconds=0.0))
    )
    for job in (usual, own, kept):
        store.cancel_job(OWNER, job.id)
    seconds = []
    for job in (usual, own, kept):
        now = store.get_job(OWNER, job.id)
        seconds.append(now.expires_at and round((now.expires_at - now.entered[now.state]).total_seconds(), 3))
    assert seconds == [1000.0, 5.0, None]
    assert store.retry_job(OWNER, own.id).expires_at is None
    store.close()


def test_a_model_outlives_its_expired_training(store: JobStore, folder: Path) -> None:
    objects = local(folder)
    job = training_job(store, asked=Terms(retention_seconds=SOON))
    claim = claimed(store)
    saved = objects.put_bytes(checkpoint_key(job.id, 5, claim.attempt, "state"), b"s")
    store.add_checkpoint(claim, 5, StoredFiles({"state": saved}))
    model = StoredFiles({"model.json": objects.put_bytes(f"jobs/{job.id}/train/a1/model/model.json", b"{}")})
    store.commit(claim, StoredFiles({f"model/{n}": i for n, i in model.files.items()}), {})
    done = store.commit(claimed(store), StoredFiles({}), {}, job_result={}, model=NewModel("1" * 64, {}, model))
    assert done.result is not None
    soon(lambda: sweep.expired(store, objects))
    assert list(objects.list("")) == [f"jobs/{job.id}/train/a1/model/model.json"]
    assert sweep.orphans(store, objects) == 0
    assert store.get_model(OWNER, done.result["model_id"]).stored == model
    generation_job(store, done.result["model_id"], parts=1)


def test_pairs_wait_for_the_evaluation_that_is_to_measure_them(store: JobStore) -> None:
    job_id = generated_pairs(store, trained_model(store))
    evaluation = evaluation_job(store, generation_job_id=job_id, reference_dataset_id=add_dataset(store))
    due_now(store, job_id)
    assert store.expirable() == [] and store.expire_job(job_id) is None
    store.cancel_job(OWNER, evaluation.id)
    assert store.expirable() == [job_id] and len(store.expire_job(job_id) or ()) == 3


def test_a_worker_that_is_still_stopping_keeps_a_job_from_expiring(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    commit_part(store, claimed(store))
    held = claimed(store)
    store.cancel_job(OWNER, job.id)
    assert store.get_job(OWNER, job.id).state is JobState.CANCELING
    assert store.expirable() == []
    store.release(held)
    due_now(store, job.id)
    assert store.expirable() == [job.id]


def test_a_process_killed_between_record_and_objects_leaves_nothing_after_the_sweep(
    store: JobStore, record_url: str, folder: Path
) -> None:
    objects = local(folder)
    job = generation_job(store, trained_model(store), parts=2)
    for index in range(2):
        claim = claimed(store)
        found = {n: objects.put_bytes(part_key(job.id, index, 1, n), b"x") for n in ("pairs.zip", "part.json")}
        store.commit(claim, StoredFiles(found), {"pairs": [{"index": index}]})
    store.commit(claimed(store), StoredFiles({}), {}, job_result={})
    due_now(store, job.id)
    done = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, record_url], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert store.get_job(OWNER, job.id).state is JobState.EXPIRED
    assert len(list(objects.list(""))) == 4, "the record was first"
    assert sweep.expired(store, objects) == 0
    assert sweep.orphans(store, objects) == 4
    assert list(objects.list("")) == []


def due_now(store: JobStore, job_id: str) -> None:
    """Let the time of a job's products be over."""
    over = jobs.update().where(jobs.c.id == job_id).values(expires_at=1.0)
    store._db.write(lambda connection: connection.execute(over))


# --- wishes ---------------------------------------------------------------------------------------------------------


def test_a_wish_is_told_with_the_renewal_and_struck_off_by_its_checkpoint(store: JobStore) -> None:
    job = training_job(store)
    with pytest.raises(Conflict, match="queued"):
        store.ask(OWNER, job.id, "sample")
    claim = claimed(store)
    assert store.renew(claim, LEASE) == "continue"
    assert store.ask(OWNER, job.id, "checkpoint").wishes == ("checkpoint",)
    assert store.ask(OWNER, job.id, "sample").wishes == ("checkpoint", "sample")
    version = store.get_job(OWNER, job.id).version
    assert store.ask(OWNER, job.id, "sample").version == version, "asking twice is asking once"
    assert store.renew(claim, LEASE) == "wish"
    assert sorted(store.wishes(claim)) == ["checkpoint", "sample"]
    store.add_checkpoint(claim, 3, files(f"jobs/{job.id}/checkpoints/00000003/a1/state.json"))
    assert store.get_job(OWNER, job.id).wishes == ("sample",)
    first = store.wishes(claim)["sample"]
    sample = StoredFiles({"sample/sheet.png": next(iter(files("x").files.values()))})
    store.add_checkpoint(claim, 4, sample)
    assert store.get_job(OWNER, job.id).wishes == () and store.renew(claim, LEASE) == "continue"
    found = [event.data.get("fulfilled") for event in store.events(OWNER, job.id) if event.type == "checkpoint"]
    assert found == [["checkpoint"], ["sample"]]
    store.ask(OWNER, job.id, "sample")
    assert store.wishes(claim)["sample"] > first


def test_a_wish_outlives_a_lost_worker_and_not_its_job(store: JobStore) -> None:
    job = training_job(store)
    lost = claimed(store)
    store.ask(OWNER, job.id, "checkpoint")
    store.renew(lost, -1.0)
    store.sweep()
    claim = claimed(store)
    assert store.renew(claim, LEASE) == "wish"
    store.commit(claim, files(f"jobs/{job.id}/train/a2/model/model.json"), {})
    ended = store.get_job(OWNER, job.id)
    assert ended.state is JobState.FINALIZING and ended.wishes == ()
    (said,) = [event.data for event in store.events(OWNER, job.id) if event.type == "not_done"]
    assert said["wishes"] == ["checkpoint"]
    with pytest.raises(Conflict, match="finalizing"):
        store.ask(OWNER, job.id, "checkpoint")


def test_wishes_are_for_trainings_of_ones_own(store: JobStore) -> None:
    generation = generation_job(store, trained_model(store))
    claimed(store)
    with pytest.raises(Conflict, match="generation"):
        store.ask(OWNER, generation.id, "sample")
    with pytest.raises(NotFound):
        store.ask(OTHER, generation.id, "sample")


# --- lists ----------------------------------------------------------------------------------------------------------


def test_a_listing_keeps_what_its_filters_say(store: JobStore) -> None:
    model = trained_model(store)
    (training,) = store.list_jobs(OWNER).items
    generation = generation_job(store, model)
    reference = add_dataset(store)
    evaluation = evaluation_job(store, reference_dataset_id=reference)

    def found(**within: object) -> list[str]:
        return [job.id for job in store.list_jobs(OWNER, within=JobFilter(**within)).items]  # type: ignore[arg-type]

    assert isinstance(training.spec, TrainingSpec)
    assert found(model_id=model) == [generation.id]
    assert found(dataset_id=training.spec.dataset_id) == [training.id]
    assert found(dataset_id=reference) == [evaluation.id]
    assert found(created_after=generation.created_at) == [evaluation.id, generation.id]
    assert found(created_before=generation.created_at) == [training.id]
    assert found(created_after=generation.created_at, model_id=model) == [generation.id]
    assert store.list_jobs(OTHER, within=JobFilter(model_id=model)).items == ()
