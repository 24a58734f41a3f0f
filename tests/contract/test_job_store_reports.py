"""What every record must do with attention and captioned jobs; what holds for any kind is in test_job_store.py."""

from __future__ import annotations

import pytest

from cffa_core.errors import Conflict, InvalidSpec
from cffa_core.jobs.records import Job, NewModel, Progress, QueueCounts
from cffa_core.jobs.spec import AttentionSpec, CaptionedSpec, CaptionedTrainingSpec, GenerationSpec, JobSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.store import JobStore
from tests.record_cases import OTHER, OWNER, add_dataset, claimed, files, trained_model


def captioned_dataset(store: JobStore) -> str:
    """A data set whose report says that three of its CFs have captions."""
    dataset_id = store.new_id("ds")
    report = {"captions": {"pairs": 3, "cf": 3, "fa": 1}}
    store.add_dataset(OWNER, dataset_id=dataset_id, name="B", digest="3" * 64, pairs=3, report=report, stored=files())
    return dataset_id


def captioned_training(store: JobStore) -> Job:
    job, _ = store.create_job(OWNER, CaptionedTrainingSpec(dataset_id=captioned_dataset(store), steps=100))
    return job


def captioned_model(store: JobStore) -> str:
    """Run a training of the captioned model through; nothing else may wait."""
    job = captioned_training(store)
    weights = files(f"jobs/{job.id}/train/a1/model/model.json")
    store.commit(claimed(store), weights, {})
    done = store.commit(claimed(store), files(), {}, model=NewModel("4" * 64, {"family": "captioned"}, weights))
    assert done.result is not None
    return str(done.result["model_id"])


def refused(store: JobStore, spec: JobSpec) -> dict[str, str]:
    """Pointer -> code of each problem of a job that must be refused."""
    with pytest.raises(InvalidSpec) as caught:
        store.create_job(OWNER, spec)
    return {problem.pointer: problem.code for problem in caught.value.problems}


def test_a_report_is_computed_by_one_unit_and_finished_by_another(store: JobStore) -> None:
    job, _ = store.create_job(OWNER, AttentionSpec(model_id=trained_model(store)))
    assert (job.kind, job.state, job.counts.requested) == (Kind.ATTENTION, JobState.QUEUED, 0)
    assert store.queue_summary()[Kind.ATTENTION] == QueueCounts(queued_jobs=1, waiting_units=1)
    work = claimed(store)
    assert (work.kind, work.index, work.spec) == (UnitKind.COMPUTE, 0, job.spec)
    store.renew(work, 30.0, Progress("sampling", 3, 10))
    assert store.get_job(OWNER, job.id).progress == Progress("sampling", 3, 10, None)
    report = files(f"jobs/{job.id}/compute/a1/report.json", f"jobs/{job.id}/compute/a1/overlays/cf.png")
    assert store.commit(work, report, {"inputs": {}}).state is JobState.FINALIZING
    done = store.commit(claimed(store), files(f"jobs/{job.id}/finalize/a1/manifest.json"), {}, job_result={"files": 2})
    assert (done.state, done.result, done.progress.total) == (JobState.SUCCEEDED, {"files": 2}, 1)
    (unit,) = store.parts(OWNER, job.id, kind=UnitKind.COMPUTE)
    assert unit.stored == report
    keys = {*(info.key for info in report.files.values()), f"jobs/{job.id}/finalize/a1/manifest.json"}
    assert set(store.delete_job(OWNER, job.id)) == keys


def test_time_left_is_that_of_earlier_jobs_of_the_kind(store: JobStore) -> None:
    spec = AttentionSpec(model_id=trained_model(store))
    store.create_job(OWNER, spec)
    store.commit(claimed(store), files("jobs/x/compute/a1/report.json"), {})
    store.commit(claimed(store), files(), {}, job_result={})
    store.register_worker("w", {"kinds": ["attention"]})
    job, _ = store.create_job(OWNER, spec)
    waits = store.get_job(OWNER, job.id).progress.eta_seconds
    assert waits is not None and waits > 0.0


def test_a_captioned_training_is_a_training(store: JobStore) -> None:
    job = captioned_training(store)
    assert job.progress == Progress("queued", 0, 100, None)
    work = claimed(store)
    assert work.kind is UnitKind.TRAIN
    store.ask(OWNER, job.id, "checkpoint")
    with pytest.raises(Conflict, match="draws no samples"):
        store.ask(OWNER, job.id, "sample")
    assert store.renew(work, 30.0, Progress("training", 10, 100)) == "wish"
    store.add_checkpoint(work, 10, files(f"jobs/{job.id}/checkpoints/00000010/a1/state.json"))
    assert store.get_job(OWNER, job.id).wishes == ()
    store.pause_job(OWNER, job.id)
    store.release(work)
    assert store.get_job(OWNER, job.id).progress == Progress("paused", 10, 100, None)
    store.resume_job(OWNER, job.id)
    again = claimed(store)
    assert again.checkpoint is not None and again.checkpoint.step == 10


def test_models_and_data_sets_that_do_not_fit_are_refused(store: JobStore) -> None:
    pairs, theirs = trained_model(store), trained_model(store, OTHER)
    captioned = captioned_model(store)
    wrong = {"/model_id": "not_a_pair_model"}
    assert refused(store, AttentionSpec(model_id=captioned)) == wrong
    assert refused(store, GenerationSpec(model_id=captioned, count=4)) == wrong
    drawn = CaptionedSpec(model_id=pairs, task="text_to_image", texts=("a",))
    assert refused(store, drawn) == {"/model_id": "not_a_captioned_model"}
    assert refused(store, drawn.model_copy(update={"model_id": theirs})) == {"/model_id": "not_found"}
    assert refused(store, AttentionSpec(model_id=theirs)) == {"/model_id": "not_found"}
    gone = CaptionedSpec(model_id=captioned, task="image_to_text", dataset_id=add_dataset(store, OTHER))
    assert refused(store, gone) == {"/dataset_id": "not_found"}
    assert refused(store, CaptionedTrainingSpec(dataset_id=add_dataset(store))) == {"/dataset_id": "no_captions"}
    one_fa = CaptionedTrainingSpec(dataset_id=captioned_dataset(store), modality="fa")
    assert refused(store, one_fa) == {"/dataset_id": "no_captions"}
