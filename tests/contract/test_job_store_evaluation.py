"""What every record must do with evaluation jobs; what holds for jobs of any kind is in test_job_store.py."""

from __future__ import annotations

import pytest

from cffa_core.errors import Conflict, InvalidSpec, LeaseLost
from cffa_core.jobs.records import Progress, QueueCounts
from cffa_core.jobs.spec import EvaluationSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.store import JobStore
from tests.record_cases import (
    OTHER,
    OWNER,
    add_dataset,
    claimed,
    evaluation_job,
    expire,
    files,
    generated_pairs,
    generation_job,
    trained_model,
    training_job,
)

NO_DATASET = "ds_" + "0" * 20
NO_JOB = "job_" + "0" * 20


def refused(store: JobStore, **fields: object) -> dict[str, str]:
    """Pointer -> code of each problem of an evaluation that must be refused."""
    with pytest.raises(InvalidSpec) as caught:
        store.create_job(OWNER, EvaluationSpec(**fields))  # type: ignore[arg-type]
    assert store.list_jobs(OWNER, kind=Kind.EVALUATION).items == ()
    return {problem.pointer: problem.code for problem in caught.value.problems}


def test_evaluation_runs_from_queued_to_a_report(store: JobStore) -> None:
    job = evaluation_job(store)
    assert (job.kind, job.state, job.counts.requested) == (Kind.EVALUATION, JobState.QUEUED, 0)
    work = claimed(store)
    assert (work.kind, work.index, work.spec) == (UnitKind.EVALUATE, 0, job.spec)
    report = files(f"jobs/{job.id}/evaluate/a1/report.json", f"jobs/{job.id}/evaluate/a1/pairs.png")
    assert store.commit(work, report, {"sets": {}}).state is JobState.FINALIZING
    finalize = claimed(store)
    assert finalize.kind is UnitKind.FINALIZE
    done = store.commit(finalize, files(f"jobs/{job.id}/finalize/a1/manifest.json"), {}, job_result={"files": 2})
    assert (done.state, done.result) == (JobState.SUCCEEDED, {"files": 2})
    assert (done.progress.current, done.progress.total) == (1, 1)
    (unit,) = store.parts(OWNER, job.id, kind=UnitKind.EVALUATE)
    assert (unit.stored, unit.info) == (report, {"sets": {}})
    keys = {*(info.key for info in report.files.values()), f"jobs/{job.id}/finalize/a1/manifest.json"}
    assert store.footprint(job.id).keys == keys
    assert set(store.delete_job(OWNER, job.id)) == keys


def test_every_id_that_does_not_exist_is_named_at_once(store: JobStore) -> None:
    theirs = add_dataset(store, OTHER)
    found = refused(store, generation_job_id=NO_JOB, reference_dataset_id=NO_DATASET, train_dataset_id=theirs)
    assert found == {
        "/generation_job_id": "not_found",
        "/reference_dataset_id": "not_found",
        "/train_dataset_id": "not_found",
    }
    assert refused(store, pairs_dataset_id=theirs, reference_dataset_id=add_dataset(store)) == {
        "/pairs_dataset_id": "not_found"
    }


def test_only_a_succeeded_generation_job_of_ones_own_is_measured(store: JobStore) -> None:
    theirs = generated_pairs(store, trained_model(store, OTHER), OTHER)
    training = training_job(store)
    store.cancel_job(OWNER, training.id)
    model_id = trained_model(store)
    queued = generation_job(store, model_id)
    for job_id, code in ((theirs, "not_found"), (training.id, "not_a_generation_job"), (queued.id, "not_succeeded")):
        found = refused(store, generation_job_id=job_id, reference_dataset_id=add_dataset(store))
        assert found == {"/generation_job_id": code}


def test_the_models_training_data_are_named_for_it(store: JobStore) -> None:
    model_id = trained_model(store)
    generated = generated_pairs(store, model_id)
    training = store.get_job(OWNER, store.get_model(OWNER, model_id).job_id)
    job = evaluation_job(store, generation_job_id=generated)
    assert job.spec.train_dataset_id == training.spec.dataset_id
    named = evaluation_job(store, generation_job_id=generated, train_dataset_id=add_dataset(store))
    assert named.spec.train_dataset_id not in (None, training.spec.dataset_id)
    # A set is no neighbour of itself, and of a deleted training nothing is known.
    itself = evaluation_job(store, generation_job_id=generated, reference_dataset_id=training.spec.dataset_id)
    assert itself.spec.train_dataset_id is None
    store.delete_job(OWNER, training.id)
    assert evaluation_job(store, generation_job_id=generated).spec.train_dataset_id is None


def test_a_repeated_post_is_known_by_what_was_posted(store: JobStore) -> None:
    generated = generated_pairs(store, trained_model(store))
    spec = EvaluationSpec(generation_job_id=generated, reference_dataset_id=add_dataset(store))
    first, _ = store.create_job(OWNER, spec, idempotency_key="k")
    assert first.spec != spec
    again, created = store.create_job(OWNER, spec, idempotency_key="k")
    assert (again.id, created) == (first.id, False)
    with pytest.raises(Conflict):
        store.create_job(OWNER, spec.model_copy(update={"seed": 1}), idempotency_key="k")


def test_evaluations_have_a_queue_of_their_own(store: JobStore) -> None:
    waiting = [evaluation_job(store) for _ in range(2)]
    theirs = evaluation_job(store, OTHER)
    training_job(store)
    assert store.queue_summary()[Kind.EVALUATION] == QueueCounts(queued_jobs=3, waiting_units=3)
    places = {job.id: store.get_job(job.owner, job.id).queue_position for job in (*waiting, theirs)}
    served = []
    while (claim := store.claim("w", [Kind.EVALUATION], lease_seconds=30.0)) is not None:
        served.append(claim.job_id)
    assert sorted(places, key=lambda job_id: places[job_id] or 0) == served
    assert set(served[:2]) & {theirs.id}, "the other owner has its turn after one job"


def test_a_lost_worker_repeats_the_evaluation(store: JobStore) -> None:
    job = evaluation_job(store)
    first = claimed(store)
    store.pin_numerics(first, "cpu/a")
    expire(store, first)
    assert store.sweep() == 1
    second = claimed(store, numerics="cpu/a")
    assert (second.unit_id, second.attempt) == (first.unit_id, 2)
    with pytest.raises(LeaseLost):
        store.commit(first, files(f"jobs/{job.id}/evaluate/a1/report.json"), {})
    store.pin_numerics(second, "cpu/b")  # nothing depends on the first attempt's key
    assert store.commit(second, files(f"jobs/{job.id}/evaluate/a2/report.json"), {}).state is JobState.FINALIZING


def test_progress_is_of_the_stage_in_hand_and_time_left_of_earlier_jobs(store: JobStore) -> None:
    first = evaluation_job(store)
    assert first.progress == Progress("queued", 0, 0, None)
    claim = claimed(store)
    store.renew(claim, 30.0, Progress("reference", 3, 10))
    assert store.get_job(OWNER, first.id).progress == Progress("reference", 3, 10, None)
    store.commit(claim, files(f"jobs/{first.id}/evaluate/a1/report.json"), {})
    store.commit(claimed(store), files(), {}, job_result={})
    store.register_worker("w", {"kinds": ["evaluation"]})
    second = evaluation_job(store)
    waits = store.get_job(OWNER, second.id).progress.eta_seconds
    assert waits is not None and waits > 0.0


def test_a_cancelled_evaluation_takes_no_report(store: JobStore) -> None:
    job = evaluation_job(store)
    claim = claimed(store)
    store.cancel_job(OWNER, job.id)
    assert store.renew(claim, 30.0, Progress("pairs", 1, 10)) == "cancel"
    with pytest.raises(LeaseLost):
        store.commit(claim, files(f"jobs/{job.id}/evaluate/a1/report.json"), {})
    assert store.get_job(OWNER, job.id).state is JobState.CANCELED
    assert store.parts(OWNER, job.id) == []
