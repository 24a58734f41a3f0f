"""Gates in the record: counts and progress, what is refused when posted, and jobs bound to another job's numerics."""

from __future__ import annotations

from typing import Any

import pytest

from cffa_core.errors import InvalidSpec, NumericsMismatch
from cffa_core.jobs.records import Claim, Counts, Job, NewModel, Progress, StoredFiles
from cffa_core.jobs.spec import GateSpec, GenerationSpec, OriginalPair
from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from cffa_core.storage.base import ObjectInfo
from tests.record_cases import (
    ALL_KINDS,
    OTHER,
    OWNER,
    claimed,
    commit_part,
    files,
    generation_job,
    trained_model,
    training_job,
)

KEY = "cpu/one/torch-2/diffusers-0/fp32/threads-1/batch-4"
GATE = GateSpec(min_alignment=0.3, max_tries=4)


def gated(store: JobStore, model_id: str, **options: Any) -> Job:
    """Eight pairs in two parts, behind a gate."""
    spec = GenerationSpec(model_id=model_id, **({"count": 8, "part_size": 4, "gate": GATE} | options))
    return store.create_job(OWNER, spec)[0]


def commit(store: JobStore, claim: Claim, accepted: int, rejected: int, exhausted: int) -> Job:
    """Commit a part as its worker reports it."""
    info = {"pairs": list(range(accepted)), "gate": {"rejected": rejected, "exhausted": exhausted}}
    return store.commit(claim, files(f"jobs/{claim.job_id}/parts/{claim.index:05d}/a1/pairs.zip"), info)


def test_counts_of_a_gate(store: JobStore) -> None:
    job = gated(store, trained_model(store))
    assert commit(store, claimed(store), 3, 5, 1).counts == Counts(8, 8, accepted=3, rejected=5, failed=1)
    done = commit(store, claimed(store), 4, 0, 0)
    assert done.counts == Counts(8, 12, accepted=7, rejected=5, failed=1)
    assert (done.state, done.progress.current, done.progress.total) == (JobState.FINALIZING, 8, 8)
    final = store.commit(claimed(store), StoredFiles({}), {"pairs": 7}, job_result={"pairs": 7})
    assert (final.id, final.state, final.counts) == (job.id, JobState.SUCCEEDED, done.counts)


def test_progress_counts_slots_that_are_settled(store: JobStore) -> None:
    gated(store, trained_model(store))
    commit(store, claimed(store), 2, 20, 2)
    claim = claimed(store)
    store.renew(claim, 30.0, Progress("sampling", 30, 60))
    progress = store.get_job(OWNER, claim.job_id).progress
    assert (progress.current, progress.total) == (6, 8)


def test_the_size_of_what_waits_is_what_is_left_of_the_slots(store: JobStore) -> None:
    """A gated job that drew many more pairs than it was asked for does not make those after it come sooner."""
    model_id = trained_model(store)
    first = gated(store, model_id)
    commit(store, claimed(store), 4, 40, 0)
    store.register_worker("w", {})
    second = generation_job(store, model_id)
    waits = store.get_job(OWNER, first.id).progress.eta_seconds
    later = store.get_job(OWNER, second.id).progress.eta_seconds
    assert waits is not None and later is not None
    assert later == pytest.approx(3 * waits, rel=0.01)


def test_a_failed_job_counts_every_slot_without_a_pair(store: JobStore) -> None:
    gated(store, trained_model(store))
    commit(store, claimed(store), 3, 4, 1)
    claim = claimed(store)
    store.fail(claim, "corrupt_artifact", "broken")
    assert store.get_job(OWNER, claim.job_id).counts == Counts(8, 7, accepted=3, rejected=4, failed=5)


def test_similarity_needs_the_thumbnails_of_the_training(store: JobStore) -> None:
    gate = GateSpec(max_similarity_to_training=0.9)
    old = trained_model(store)
    assert store.novelty_file(OWNER, old) is None
    with pytest.raises(InvalidSpec) as caught:
        gated(store, old, gate=gate)
    assert [problem.pointer for problem in caught.value.problems] == ["/gate/max_similarity_to_training"]
    training = training_job(store)
    novelty = ObjectInfo(f"jobs/{training.id}/train/a1/novelty.safetensors", 9, "cd" * 32)
    store.commit(claimed(store), StoredFiles({"novelty.safetensors": novelty}), {})
    made = store.commit(claimed(store), StoredFiles({}), {}, model=NewModel("2" * 64, {}, StoredFiles({})))
    assert made.result is not None
    model_id = made.result["model_id"]
    assert store.novelty_file(OWNER, model_id) == novelty
    store.cancel_job(OWNER, gated(store, model_id, gate=gate).id)
    store.delete_job(OWNER, training.id)
    with pytest.raises(InvalidSpec):
        gated(store, model_id, gate=gate)


def original(job: Job) -> GenerationSpec:
    """The spec that regenerates pair 2 of a job."""
    pair = OriginalPair(job_id=job.id, cf="a" * 64, fa="b" * 64)
    assert isinstance(job.spec, GenerationSpec)
    return job.spec.model_copy(update={"only": ((2, 0),), "regenerates": pair})


def test_a_pair_is_regenerated_under_the_numerics_of_its_job_alone(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=1)
    with pytest.raises(InvalidSpec) as caught:
        store.create_job(OWNER, original(job))
    assert [problem.pointer for problem in caught.value.problems] == ["/regenerates/job_id"]
    claim = claimed(store)
    store.pin_numerics(claim, KEY)
    commit_part(store, claim)
    store.commit(claimed(store), StoredFiles({}), {}, job_result={})
    with pytest.raises(InvalidSpec):
        store.create_job(OTHER, original(job))
    again, _ = store.create_job(OWNER, original(job))
    assert (again.numerics_key, again.counts.requested) == (KEY, 1)
    assert store.claim("v", ALL_KINDS, lease_seconds=30, numerics="cpu/two/") is None
    claim = claimed(store)
    assert claim.job_id == again.id
    with pytest.raises(NumericsMismatch):
        store.pin_numerics(claim, KEY.replace("threads-1", "threads-2"))
    store.pin_numerics(claim, KEY)
