"""What every record must do for owners: data sets, jobs, listings, states. Workers: test_job_store_claims.py."""

from __future__ import annotations

import time

import pytest

from cffa_core.errors import Conflict, InvalidSpec, LeaseLost, NotFound
from cffa_core.jobs.records import NewModel, QueueCounts
from cffa_core.jobs.spec import GenerationSpec, Kind, TrainingSpec
from cffa_core.jobs.state import JobState, UnitKind, UnitState
from cffa_core.jobs.store import JobStore
from tests.record_cases import (
    OTHER,
    OWNER,
    add_dataset,
    claimed,
    commit_part,
    files,
    generation_job,
    trained_model,
    training_job,
)

CLOCK_GRAIN = 0.005  # SQLite tells the time in milliseconds


def state_events(store: JobStore, job_id: str) -> list[str]:
    return [event.data["after"] for event in store.events(OWNER, job_id, limit=1000) if event.type == "state"]


def test_a_data_set_comes_back_as_it_was_added(store: JobStore) -> None:
    dataset_id = store.new_id("ds")
    stored = files(f"datasets/{dataset_id}/cf/m001.png", f"datasets/{dataset_id}/dataset.json")
    added = store.add_dataset(
        OWNER, dataset_id=dataset_id, name="März", digest="9" * 64, pairs=2, report={"pairs": []}, stored=stored
    )
    found = store.get_dataset(OWNER, dataset_id)
    assert found == added
    assert (found.name, found.pairs, found.stored, found.report) == ("März", 2, stored, {"pairs": []})


def test_an_id_of_a_data_set_is_taken_once(store: JobStore) -> None:
    dataset_id = add_dataset(store)
    with pytest.raises(Conflict):
        store.add_dataset(OTHER, dataset_id=dataset_id, name="x", digest="0" * 64, pairs=2, report={}, stored=files())
    assert store.get_dataset(OWNER, dataset_id).name == "retinas"


def test_another_owners_ids_are_not_found(store: JobStore) -> None:
    model_id = trained_model(store)
    job = generation_job(store, model_id)
    dataset_id = add_dataset(store)
    for ask in (
        lambda: store.get_dataset(OTHER, dataset_id),
        lambda: store.get_model(OTHER, model_id),
        lambda: store.get_job(OTHER, job.id),
        lambda: store.cancel_job(OTHER, job.id),
        lambda: store.pause_job(OTHER, job.id),
        lambda: store.resume_job(OTHER, job.id),
        lambda: store.retry_job(OTHER, job.id),
        lambda: store.delete_job(OTHER, job.id),
        lambda: store.events(OTHER, job.id),
        lambda: store.metrics(OTHER, job.id),
        lambda: store.parts(OTHER, job.id),
        lambda: store.checkpoints(OTHER, job.id),
    ):
        with pytest.raises(NotFound):
            ask()
    assert store.get_job(OWNER, job.id).state is JobState.QUEUED


def test_listings_page_through_everything_newest_first(store: JobStore) -> None:
    ids = [add_dataset(store) for _ in range(5)]
    add_dataset(store, OTHER)
    first = store.list_datasets(OWNER, page_size=2)
    second = store.list_datasets(OWNER, page_size=2, page_token=first.next_token)
    third = store.list_datasets(OWNER, page_size=2, page_token=second.next_token)
    assert [item.id for page in (first, second, third) for item in page.items] == ids[::-1]
    assert third.next_token is None


@pytest.mark.parametrize(
    "arguments", [{"page_token": "x"}, {"page_token": ""}, {"page_token": "9" * 30}, {"page_size": 0}]
)
def test_a_bad_page_is_refused_by_name(store: JobStore, arguments: dict[str, object]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        store.list_jobs(OWNER, **arguments)  # type: ignore[arg-type]
    assert caught.value.problems[0].pointer == f"/{next(iter(arguments))}"


def test_jobs_are_listed_by_kind_and_state(store: JobStore) -> None:
    model_id = trained_model(store)
    generation = generation_job(store, model_id)
    training = training_job(store)
    store.cancel_job(OWNER, training.id)
    assert [job.id for job in store.list_jobs(OWNER, kind=Kind.GENERATION).items] == [generation.id]
    assert [job.id for job in store.list_jobs(OWNER, state=JobState.CANCELED).items] == [training.id]
    assert len(store.list_jobs(OWNER).items) == 3
    assert store.list_jobs(OTHER).items == ()


def test_the_same_key_and_body_replay_the_job(store: JobStore) -> None:
    spec = TrainingSpec(dataset_id=add_dataset(store))
    first, created = store.create_job(OWNER, spec, idempotency_key="k1")
    again, created_again = store.create_job(OWNER, spec, idempotency_key="k1")
    assert (created, created_again, again.id) == (True, False, first.id)
    assert len(store.list_jobs(OWNER).items) == 1


def test_the_same_key_with_another_body_is_a_conflict(store: JobStore) -> None:
    spec = TrainingSpec(dataset_id=add_dataset(store))
    store.create_job(OWNER, spec, idempotency_key="k1")
    with pytest.raises(Conflict) as caught:
        store.create_job(OWNER, spec.model_copy(update={"steps": 7}), idempotency_key="k1")
    assert caught.value.problems[0].code == "idempotency_key_reused"
    assert len(store.list_jobs(OWNER).items) == 1


def test_a_key_belongs_to_its_owner(store: JobStore) -> None:
    store.create_job(OWNER, TrainingSpec(dataset_id=add_dataset(store)), idempotency_key="k1")
    _, created = store.create_job(OTHER, TrainingSpec(dataset_id=add_dataset(store, OTHER)), idempotency_key="k1")
    assert created


def test_a_job_on_somebody_elses_data_is_refused_by_pointer(store: JobStore) -> None:
    with pytest.raises(InvalidSpec) as no_dataset:
        store.create_job(OWNER, TrainingSpec(dataset_id=add_dataset(store, OTHER)))
    with pytest.raises(InvalidSpec) as no_model:
        store.create_job(OWNER, GenerationSpec(model_id=trained_model(store, OTHER), count=1))
    assert no_dataset.value.problems[0].pointer == "/dataset_id"
    assert no_model.value.problems[0].pointer == "/model_id"
    assert store.list_jobs(OWNER).items == ()


def test_training_runs_from_queued_to_a_model(store: JobStore) -> None:
    job = training_job(store)
    work = claimed(store)
    assert (work.kind, work.attempt, work.spec) == (UnitKind.TRAIN, 1, job.spec)
    store.commit(work, files(f"jobs/{job.id}/train/a1/log.txt"), {"best": 0.5})
    finalize = claimed(store)
    assert finalize.kind is UnitKind.FINALIZE
    store.fail(finalize, "corrupt_artifact", "log.txt does not match its digest")
    assert store.list_models(OWNER).items == ()
    store.retry_job(OWNER, job.id)
    done = store.commit(
        claimed(store), files(), {}, job_result={"a": 1}, model=NewModel("d" * 64, {"steps": 100}, files("jobs/x/m"))
    )
    assert done.result is not None
    model_id = done.result["model_id"]
    assert done.state is JobState.SUCCEEDED
    assert done.result == {"a": 1, "model_id": model_id}
    assert state_events(store, job.id) == [
        "running",
        "finalizing",
        "failed",
        "queued",
        "finalizing",
        "succeeded",
    ]
    assert [model.id for model in store.list_models(OWNER, job_id=job.id).items] == [model_id]
    assert store.get_model(OWNER, model_id).card == {"steps": 100}


def test_generation_counts_pairs_and_finalizes_after_the_last_part(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=3)
    assert job.counts.requested == 12
    claims = [claimed(store, f"w{index}") for index in range(3)]
    assert [claim.index for claim in claims] == [0, 1, 2]
    assert store.claim("w9", list(Kind), lease_seconds=30.0) is None
    for claim in reversed(claims[1:]):
        assert commit_part(store, claim).state is JobState.RUNNING
        assert store.claim("w9", list(Kind), lease_seconds=30.0) is None
    after = commit_part(store, claims[0])
    assert (after.state, after.counts.generated) == (JobState.FINALIZING, 12)
    done = store.commit(claimed(store), files("jobs/x/archive.zip"), {}, job_result={"pairs": 12})
    assert (done.state, done.result) == (JobState.SUCCEEDED, {"pairs": 12})
    parts = store.parts(OWNER, job.id)
    assert [(part.kind, part.index) for part in parts] == [
        (UnitKind.PART, 0),
        (UnitKind.PART, 1),
        (UnitKind.PART, 2),
        (UnitKind.FINALIZE, 0),
    ]
    assert set(parts[1].stored.files) == {"pairs.zip", "part.json"}
    assert [part.index for part in store.parts(OWNER, job.id, kind=UnitKind.PART, first=1, limit=1)] == [1]


def test_every_change_raises_the_version_and_times_are_kept(store: JobStore) -> None:
    job = training_job(store)
    seen = [job.version]
    claim = claimed(store)
    seen.append(store.get_job(OWNER, job.id).version)
    store.add_checkpoint(claim, 10, files("jobs/x/c"))
    seen.append(store.get_job(OWNER, job.id).version)
    last = store.commit(claim, files(), {})
    seen.append(last.version)
    assert seen == sorted(set(seen))
    assert set(last.entered) == {JobState.QUEUED, JobState.RUNNING, JobState.FINALIZING}
    assert job.created_at <= last.entered[JobState.RUNNING] <= last.entered[JobState.FINALIZING]


def test_events_are_numbered_without_gaps_and_paged(store: JobStore) -> None:
    job = training_job(store)
    store.commit(claimed(store), files(), {})
    history = store.events(OWNER, job.id)
    assert [event.seq for event in history] == list(range(1, len(history) + 1))
    assert history[0].type == "created"
    assert store.events(OWNER, job.id, after_seq=2, limit=2) == history[2:4]


def test_cancelling_waits_for_the_worker(store: JobStore) -> None:
    queued = training_job(store)
    assert store.cancel_job(OWNER, queued.id).state is JobState.CANCELED
    running = training_job(store)
    claim = claimed(store)
    assert store.cancel_job(OWNER, running.id).state is JobState.CANCELING
    assert store.cancel_job(OWNER, running.id).state is JobState.CANCELING
    assert store.renew(claim, 30.0) == "cancel"
    store.release(claim)
    assert store.get_job(OWNER, running.id).state is JobState.CANCELED
    assert store.claim("w", list(Kind), lease_seconds=30.0) is None


def test_a_job_without_live_claim_is_cancelled_at_once(store: JobStore) -> None:
    job = generation_job(store, trained_model(store))
    commit_part(store, claimed(store))
    assert store.cancel_job(OWNER, job.id).state is JobState.CANCELED
    assert len(store.parts(OWNER, job.id)) == 1
    assert state_events(store, job.id) == ["running", "canceling", "canceled"]


def test_finalizing_may_be_cancelled_until_the_result_is_written(store: JobStore) -> None:
    job = training_job(store)
    store.commit(claimed(store), files(), {})
    finalize = claimed(store)
    store.cancel_job(OWNER, job.id)
    with pytest.raises(LeaseLost):
        store.commit(finalize, files(), {}, job_result={"late": True})
    found = store.get_job(OWNER, job.id)
    assert (found.state, found.result) == (JobState.CANCELED, None)


def test_finished_jobs_refuse_to_be_cancelled_paused_resumed_or_retried(store: JobStore) -> None:
    trained_model(store)
    job = store.list_jobs(OWNER).items[0]
    for ask in (store.cancel_job, store.pause_job, store.resume_job, store.retry_job):
        with pytest.raises(Conflict):
            ask(OWNER, job.id)
    assert store.get_job(OWNER, job.id) == job


def test_pausing_holds_a_job_until_it_is_resumed(store: JobStore) -> None:
    job = generation_job(store, trained_model(store))
    first = claimed(store)
    assert store.pause_job(OWNER, job.id).state is JobState.PAUSING
    with pytest.raises(Conflict):
        store.resume_job(OWNER, job.id)
    assert store.renew(first, 30.0) == "pause"
    assert commit_part(store, first).state is JobState.PAUSED
    assert store.claim("w", list(Kind), lease_seconds=30.0) is None
    assert store.resume_job(OWNER, job.id).state is JobState.RUNNING
    assert claimed(store).index == 1


def test_a_queued_job_pauses_at_once_and_finalizing_cannot(store: JobStore) -> None:
    job = training_job(store)
    assert store.pause_job(OWNER, job.id).state is JobState.PAUSED
    assert store.resume_job(OWNER, job.id).state is JobState.QUEUED
    store.commit(claimed(store), files(), {})
    with pytest.raises(Conflict):
        store.pause_job(OWNER, job.id)


def test_retry_keeps_what_was_finished(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=3)
    commit_part(store, claimed(store))
    store.fail(claimed(store), "internal", "the VAE gave NaN")
    failed = store.get_job(OWNER, job.id)
    assert (failed.state, failed.counts.failed, failed.reason) == (JobState.FAILED, 8, "internal")
    assert failed.error == {"code": "internal", "message": "the VAE gave NaN", "unit": "part", "index": 1}
    again = store.retry_job(OWNER, job.id)
    assert (again.state, again.error, again.counts.generated) == (JobState.RUNNING, None, 4)
    assert [claimed(store).index, claimed(store).index] == [1, 2]


def test_only_a_job_that_is_over_can_be_deleted(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    finished, running = claimed(store), claimed(store)
    commit_part(store, finished)
    with pytest.raises(Conflict):
        store.delete_job(OWNER, job.id)
    store.cancel_job(OWNER, job.id)
    store.release(running)
    keys = store.delete_job(OWNER, job.id)
    assert keys == (f"jobs/{job.id}/parts/00000/a1/pairs.zip", f"jobs/{job.id}/parts/00000/a1/part.json")
    with pytest.raises(NotFound):
        store.get_job(OWNER, job.id)


def test_deleting_waits_for_workers_of_a_failed_job(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    bad, busy = claimed(store), claimed(store)
    store.fail(bad, "internal", "x")
    assert store.renew(busy, 30.0) == "cancel"
    with pytest.raises(Conflict):
        store.delete_job(OWNER, job.id)
    store.release(busy)
    store.delete_job(OWNER, job.id)


def test_deleting_a_training_job_keeps_its_model_and_the_models_files(store: JobStore) -> None:
    model_id = trained_model(store)
    job = store.list_jobs(OWNER).items[0]
    keys = store.delete_job(OWNER, job.id)
    assert keys == (f"jobs/{job.id}/finalize/a1/manifest.json",)
    model = store.get_model(OWNER, model_id)
    assert set(model.stored.files) == {"model.json"}
    assert generation_job(store, model_id).state is JobState.QUEUED


def test_a_deleted_job_frees_its_idempotency_key(store: JobStore) -> None:
    spec = TrainingSpec(dataset_id=add_dataset(store))
    first, _ = store.create_job(OWNER, spec, idempotency_key="k")
    store.cancel_job(OWNER, first.id)
    store.delete_job(OWNER, first.id)
    second, created = store.create_job(OWNER, spec, idempotency_key="k")
    assert created
    assert second.id != first.id


def test_queue_positions_follow_the_turns_of_owners(store: JobStore) -> None:
    mine = [training_job(store).id for _ in range(3)]
    other = training_job(store, OTHER).id
    urgent = training_job(store, priority=5).id
    positions = {job.id: job.queue_position for owner in (OWNER, OTHER) for job in store.list_jobs(owner).items}
    served = [claimed(store).job_id for _ in range(5)]
    assert sorted(positions, key=lambda job_id: positions[job_id] or 0) == served
    assert sorted(position or 0 for position in positions.values()) == [1, 2, 3, 4, 5]
    assert served == [urgent, other, *mine]
    assert store.get_job(OWNER, mine[0]).queue_position is None


def test_nothing_of_a_job_that_is_over_waits(store: JobStore) -> None:
    model_id = trained_model(store)
    canceled, failed = generation_job(store, model_id, parts=3), generation_job(store, model_id, parts=3)
    store.cancel_job(OWNER, canceled.id)
    busy, bad = claimed(store), claimed(store)
    assert (busy.job_id, bad.job_id) == (failed.id, failed.id)
    store.fail(bad, "internal", "x")
    store.release(busy)
    assert store.queue_summary()[Kind.GENERATION] == QueueCounts()


def test_the_queue_summary_counts_jobs_and_units(store: JobStore) -> None:
    model_id = trained_model(store)
    generation_job(store, model_id, parts=3)
    generation_job(store, model_id, parts=2)
    paused = generation_job(store, model_id, parts=7)
    store.pause_job(OWNER, paused.id)
    training_job(store)
    store.claim("w", [Kind.GENERATION], lease_seconds=30.0)
    assert store.queue_summary() == {kind: QueueCounts() for kind in Kind} | {
        Kind.TRAINING: QueueCounts(queued_jobs=1, active_jobs=0, waiting_units=1, running_units=0),
        Kind.GENERATION: QueueCounts(queued_jobs=1, active_jobs=1, waiting_units=4, running_units=1),
    }


def test_the_load_counts_everything_that_metrics_show(store: JobStore) -> None:
    empty = store.load()
    assert set(empty.jobs) == {(kind, state) for kind in Kind for state in JobState}
    assert not any(empty.jobs.values())
    assert (empty.oldest_seconds, empty.workers) == (dict.fromkeys(Kind, 0.0), 0)
    model_id = trained_model(store)
    generation_job(store, model_id, parts=3)
    paused = generation_job(store, model_id, parts=7)
    store.pause_job(OWNER, paused.id)
    store.register_worker("w", {})
    claimed(store)
    time.sleep(0.05)
    load = store.load()
    assert {key: number for key, number in load.jobs.items() if number} == {
        (Kind.TRAINING, JobState.SUCCEEDED): 1,
        (Kind.GENERATION, JobState.RUNNING): 1,
        (Kind.GENERATION, JobState.PAUSED): 1,
    }
    nothing = {(kind, state): 0 for kind in Kind for state in (UnitState.QUEUED, UnitState.RUNNING)}
    assert load.units == nothing | {
        (Kind.GENERATION, UnitState.QUEUED): 2,
        (Kind.GENERATION, UnitState.RUNNING): 1,
    }
    assert load.oldest_seconds[Kind.GENERATION] >= 0.05
    assert load.oldest_seconds[Kind.TRAINING] == 0.0
    assert load.workers == 1


def test_waiting_begins_anew_when_a_unit_comes_back(store: JobStore) -> None:
    job = training_job(store)
    time.sleep(0.1)
    store.pause_job(OWNER, job.id)
    assert store.load().oldest_seconds[Kind.TRAINING] == 0.0
    begun = time.monotonic()
    store.resume_job(OWNER, job.id)
    assert store.load().oldest_seconds[Kind.TRAINING] <= time.monotonic() - begun + CLOCK_GRAIN
    time.sleep(0.1)
    claim = claimed(store)
    begun = time.monotonic()
    store.release(claim)
    assert store.load().oldest_seconds[Kind.TRAINING] <= time.monotonic() - begun + CLOCK_GRAIN


def test_a_waiting_job_is_told_a_time_once_a_rate_was_measured(store: JobStore) -> None:
    model_id = trained_model(store)
    first, second = generation_job(store, model_id, parts=1), generation_job(store, model_id, parts=2)
    assert store.get_job(OWNER, second.id).progress.eta_seconds is None
    part = claimed(store)
    time.sleep(0.2)
    commit_part(store, part)
    assert store.get_job(OWNER, second.id).progress.eta_seconds is None  # nobody is there to do it
    store.register_worker("w", {"kinds": ["training"]})
    assert store.get_job(OWNER, second.id).progress.eta_seconds is None
    store.register_worker("w", {"kinds": ["generation"]})
    alone = store.get_job(OWNER, second.id)
    assert (alone.queue_position, alone.progress.stage) == (1, "queued")
    # One part of four pairs took at least 0.2 s, and this one has two.
    assert alone.progress.eta_seconds is not None
    assert 0.4 <= alone.progress.eta_seconds < 20.0
    store.register_worker("w2", {})
    assert store.get_job(OWNER, second.id).progress.eta_seconds == pytest.approx(alone.progress.eta_seconds / 2)
    assert store.get_job(OWNER, first.id).progress.eta_seconds == 0.0
    assert [job.progress.eta_seconds for job in store.list_jobs(OWNER, state=JobState.QUEUED).items] == [
        pytest.approx(alone.progress.eta_seconds / 2)
    ]


def test_training_is_measured_too(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    time.sleep(0.1)
    store.release(claim)  # paused by its worker: the time counts all the same
    claim = claimed(store)
    time.sleep(0.1)
    store.commit(claim, files(), {})
    assert job.progress.total == 100
    store.register_worker("w", {})
    waiting = training_job(store)
    eta = store.get_job(OWNER, waiting.id).progress.eta_seconds
    assert eta is not None
    assert 0.2 <= eta < 20.0
