"""What every record must do with export jobs; what holds for jobs of any kind is in test_job_store.py."""

from __future__ import annotations

import time
from typing import Any

import pytest

from cffa_core.errors import CffaError, Conflict, Expired, InvalidSpec, NotFound
from cffa_core.jobs.exports import numbers_of
from cffa_core.jobs.records import Job, Progress, QueueCounts, Terms
from cffa_core.jobs.spec import ExportSpec, GateSpec, GenerationSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.store import JobStore
from tests.record_cases import (
    OTHER,
    OWNER,
    claimed,
    commit_part,
    files,
    generated_pairs,
    generation_job,
    trained_model,
    training_job,
)

NO_JOB = "job_" + "0" * 20


def export(store: JobStore, job_id: str, owner: str = OWNER, **fields: Any) -> Job:
    spec = ExportSpec.model_validate({"generation_job_id": job_id} | fields)
    return store.create_job(owner, spec)[0]


def parts_of(job: Job) -> list[int]:
    assert isinstance(job.spec, ExportSpec)
    return numbers_of(job.spec.parts)


def refused(store: JobStore, job_id: str, **selection: Any) -> dict[str, str]:
    """Pointer -> code of each problem of an export that must be refused."""
    with pytest.raises(InvalidSpec) as caught:
        export(store, job_id, selection=selection)
    return {problem.pointer: problem.code for problem in caught.value.problems}


def test_an_export_runs_from_queued_to_its_archives(store: JobStore) -> None:
    made = generated_pairs(store, trained_model(store), parts=3)
    job = export(store, made, form="webdataset")
    assert (job.kind, job.state, job.counts.requested, job.queue_position) == (Kind.EXPORT, JobState.QUEUED, 0, 1)
    assert parts_of(job) == [0, 1, 2]
    assert store.queue_summary()[Kind.EXPORT] == QueueCounts(queued_jobs=1, waiting_units=1)
    work = claimed(store)
    assert (work.kind, work.index, work.spec) == (UnitKind.EXPORT, 0, job.spec)
    store.renew(work, 30.0, Progress("exporting", 1, 3))
    assert store.get_job(OWNER, job.id).progress == Progress("exporting", 1, 3, None)
    shards = files(f"jobs/{job.id}/export/a1/pairs-000000.tar")
    assert store.commit(work, shards, {"files": []}).state is JobState.FINALIZING
    done = store.commit(claimed(store), files(f"jobs/{job.id}/finalize/a1/manifest.json"), {}, job_result={"files": 1})
    assert (done.state, done.result, done.progress.eta_seconds) == (JobState.SUCCEEDED, {"files": 1}, 0.0)
    keys = {f"jobs/{job.id}/export/a1/pairs-000000.tar", f"jobs/{job.id}/finalize/a1/manifest.json"}
    assert store.footprint(job.id).keys == keys
    assert set(store.delete_job(OWNER, job.id)) == keys, "the pairs of the generation job stay"
    assert store.get_job(OWNER, made).state is JobState.SUCCEEDED


def test_of_a_running_job_the_finished_parts_are_locked_in(store: JobStore) -> None:
    made = generation_job(store, trained_model(store), parts=5)
    claims = [claimed(store) for _ in range(4)]
    for number in (0, 1, 3):
        commit_part(store, claims[number])
    job = export(store, made.id)
    assert isinstance(job.spec, ExportSpec) and job.spec.parts == ((0, 1), (3, 3))
    commit_part(store, claims[2])
    assert parts_of(store.get_job(OWNER, job.id)) == [0, 1, 3]
    assert parts_of(export(store, made.id)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("selection", "parts"),
    [
        ({"indices": [0, 9]}, [0, 2]),
        ({"first": 4, "last": 7}, [1]),
        ({"first": 7}, [1, 2]),
        ({"last": 3}, [0]),
        ({"indices": [1, 9], "first": 2}, [2]),
    ],
)
def test_only_parts_that_a_selection_touches_are_taken(
    store: JobStore, selection: dict[str, Any], parts: list[int]
) -> None:
    made = generated_pairs(store, trained_model(store), parts=3)
    assert parts_of(export(store, made, selection=selection)) == parts


def test_pairs_that_are_not_there_are_named_when_it_is_posted(store: JobStore) -> None:
    made = generation_job(store, trained_model(store), parts=3)
    commit_part(store, claimed(store))
    assert refused(store, made.id, indices=[0, 12]) == {"/selection/indices": "out_of_range"}
    assert refused(store, made.id, indices=[0, 5]) == {"/selection/indices": "not_made"}
    assert refused(store, made.id, first=12) == {"/selection/first": "out_of_range"}
    assert refused(store, made.id, first=5, last=9) == {"/selection": "nothing_selected"}
    assert refused(store, made.id, accepted_only=True) == {"/selection/accepted_only": "no_gate"}
    assert store.list_jobs(OWNER, kind=Kind.EXPORT).items == ()


def test_a_job_with_a_gate_can_be_asked_for_its_accepted_pairs(store: JobStore) -> None:
    gate = GateSpec(min_alignment=0.4)
    spec = GenerationSpec(model_id=trained_model(store), count=4, part_size=4, gate=gate)
    made, _ = store.create_job(OWNER, spec)
    commit_part(store, claimed(store))
    assert parts_of(export(store, made.id, selection={"accepted_only": True})) == [0]


def test_what_has_no_pairs_for_this_owner_is_refused(store: JobStore) -> None:
    made = generated_pairs(store, trained_model(store))
    nothing_yet = generation_job(store, trained_model(store))
    training = training_job(store)
    cases: list[tuple[str, str, type[CffaError]]] = [
        (OTHER, made, NotFound),
        (OWNER, NO_JOB, NotFound),
        (OWNER, training.id, Conflict),
        (OWNER, nothing_yet.id, Conflict),
    ]
    for owner, job_id, error in cases:
        with pytest.raises(error):
            export(store, job_id, owner)


def test_expired_pairs_cannot_be_exported_and_unfinished_exports_keep_them(store: JobStore) -> None:
    made = generation_job(store, trained_model(store), parts=1, asked=Terms(retention_seconds=0.01))
    commit_part(store, claimed(store))
    store.commit(claimed(store), files(f"jobs/{made.id}/finalize/a1/archive.zip"), {}, job_result={})
    job = export(store, made.id)
    time.sleep(0.05)
    assert made.id not in store.expirable(), "an export needs its pairs"
    store.cancel_job(OWNER, job.id)
    assert made.id in store.expirable()
    assert store.expire_job(made.id)
    with pytest.raises(Expired):
        export(store, made.id)


def test_the_same_key_replays_an_export_that_would_now_have_more_parts(store: JobStore) -> None:
    made = generation_job(store, trained_model(store), parts=2)
    commit_part(store, claimed(store))
    spec = ExportSpec(generation_job_id=made.id)
    first, created = store.create_job(OWNER, spec, idempotency_key="k")
    commit_part(store, claimed(store, prefer_job=made.id))
    again, made_anew = store.create_job(OWNER, spec, idempotency_key="k")
    assert (again.id, created, made_anew, parts_of(again)) == (first.id, True, False, [0])
