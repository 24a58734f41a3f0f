"""What every record must do for workers: claims, fencing, leases, fairness, crashes, checkpoints, metrics."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import sqlalchemy as sa

from cffa_core.errors import LeaseLost, NotFound, NumericsMismatch
from cffa_core.jobs.records import Progress
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.store import JobStore
from tests.record_cases import (
    ALL_KINDS,
    LEASE,
    OTHER,
    OWNER,
    claimed,
    commit_part,
    expire,
    files,
    generation_job,
    part_info,
    trained_model,
    training_job,
)


def test_a_unit_is_claimed_once(store: JobStore) -> None:
    training_job(store)
    claimed(store)
    assert store.claim("w2", ALL_KINDS, lease_seconds=LEASE) is None


def test_a_worker_claims_only_its_kinds(store: JobStore) -> None:
    training_job(store)
    assert store.claim("w", [Kind.GENERATION], lease_seconds=LEASE) is None
    assert store.claim("w", [], lease_seconds=LEASE) is None
    assert store.claim("w", [Kind.TRAINING], lease_seconds=LEASE) is not None


def test_a_lost_workers_unit_returns_and_its_late_commit_changes_nothing(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=1)
    lost = claimed(store, "lost")
    expire(store, lost)
    assert store.sweep() == 1
    waiting = store.get_job(OWNER, job.id)
    assert (waiting.state, waiting.reason) == (JobState.QUEUED, "worker_lost")
    second = claimed(store, "second")
    assert (second.unit_id, second.attempt) == (lost.unit_id, 2)
    before = store.get_job(OWNER, job.id)
    for late in (
        lambda: commit_part(store, lost),
        lambda: store.renew(lost, LEASE),
        lambda: store.add_metrics(lost, 1, {"loss": 1.0}),
        lambda: store.add_checkpoint(lost, 1, files("jobs/x/late")),
        lambda: store.pin_numerics(lost, "other"),
        lambda: store.release(lost),
        lambda: store.crashed(lost, "late", made_progress=False),
        lambda: store.fail(lost, "late", "late"),
    ):
        with pytest.raises(LeaseLost):
            late()
    assert store.get_job(OWNER, job.id) == before
    assert store.parts(OWNER, job.id) == []
    assert commit_part(store, second).counts.generated == 4


def test_a_repeated_commit_is_answered_and_changes_nothing(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=1)
    part = claimed(store)
    after = commit_part(store, part)
    assert commit_part(store, part) == after
    for other in (files("jobs/x/other"), files()):
        with pytest.raises(LeaseLost):
            store.commit(part, other, part_info(part))
    assert store.get_job(OWNER, job.id) == after
    finalize = claimed(store)
    done = store.commit(finalize, files("jobs/x/archive.zip"), {}, job_result={"pairs": 4})
    assert store.commit(finalize, files("jobs/x/archive.zip"), {}, job_result={"pairs": 4}) == done


def test_a_sweep_frees_only_the_leases_that_ran_out(store: JobStore) -> None:
    generation_job(store, trained_model(store), parts=2)
    late, busy = claimed(store), claimed(store)
    expire(store, late)
    assert store.sweep() == 1
    assert store.renew(busy, LEASE) == "continue"
    assert claimed(store).unit_id == late.unit_id


def test_a_late_worker_keeps_its_unit_until_somebody_swept_it(store: JobStore) -> None:
    training_job(store)
    claim = claimed(store)
    expire(store, claim)
    assert store.renew(claim, LEASE) == "continue"
    assert store.sweep() == 0


def test_leases_follow_the_databases_clock_not_the_callers(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    training_job(store)
    short = claimed(store, lease_seconds=0.05)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 86_400.0)
    time.sleep(0.08)
    assert store.sweep() == 1
    claimed(store, lease_seconds=LEASE)
    monkeypatch.setattr(time, "time", lambda: real() + 86_400.0)
    assert store.sweep() == 0
    with pytest.raises(LeaseLost):
        store.renew(short, LEASE)


def test_a_lost_worker_does_not_stop_a_cancel(store: JobStore) -> None:
    job = training_job(store)
    expire(store, claimed(store))
    store.cancel_job(OWNER, job.id)
    assert store.sweep() == 1
    assert store.get_job(OWNER, job.id).state is JobState.CANCELED


def test_a_lost_worker_does_not_stop_a_pause(store: JobStore) -> None:
    job = training_job(store)
    expire(store, claimed(store))
    store.pause_job(OWNER, job.id)
    store.sweep()
    assert store.get_job(OWNER, job.id).state is JobState.PAUSED


def test_a_clean_release_costs_nothing(store: JobStore) -> None:
    job = training_job(store)
    for attempt in range(1, 15):
        claim = claimed(store)
        assert claim.attempt == attempt
        store.release(claim)
    assert store.get_job(OWNER, job.id).state is JobState.QUEUED


def test_the_reason_of_a_release_is_shown_until_the_next_claim(store: JobStore) -> None:
    job = training_job(store)
    store.release(claimed(store), reason="numerics_mismatch")
    assert store.get_job(OWNER, job.id).reason == "numerics_mismatch"
    claimed(store)
    assert store.get_job(OWNER, job.id).reason is None


def test_the_detail_of_a_crash_stays_in_the_history(store: JobStore) -> None:
    job = training_job(store)
    store.crashed(claimed(store), "ValueError", made_progress=False, detail="Traceback: line 7")
    crash = next(event for event in store.events(OWNER, job.id) if event.type == "crashed")
    assert (crash.data["reason"], crash.data["detail"]) == ("ValueError", "Traceback: line 7")
    assert "Traceback" not in str(store.get_job(OWNER, job.id).reason)


def test_three_crashes_in_a_row_fail_the_job_with_the_reason(store: JobStore) -> None:
    job = training_job(store)
    assert store.crashed(claimed(store), "signal 11", made_progress=False)
    assert store.crashed(claimed(store), "signal 11", made_progress=False)
    assert store.get_job(OWNER, job.id).reason == "signal 11"
    assert not store.crashed(claimed(store), "killed by the kernel", made_progress=False)
    failed = store.get_job(OWNER, job.id)
    assert failed.state is JobState.FAILED
    assert failed.error is not None
    assert failed.error["code"] == "crashed"
    assert "killed by the kernel" in failed.error["message"]
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None


def test_progress_forgives_crashes_but_not_for_ever(store: JobStore) -> None:
    training_job(store)
    alive = [store.crashed(claimed(store), "x", made_progress=True) for _ in range(10)]
    assert alive == [True] * 9 + [False]


def test_a_checkpoint_forgives_crashes_and_lost_workers(store: JobStore) -> None:
    job = training_job(store)
    for step in range(1, 8):
        assert store.crashed(claimed(store), "x", made_progress=False)
        expire(store, claimed(store))
        store.sweep()
        claim = claimed(store)
        store.add_checkpoint(claim, step, files(f"jobs/x/{step}"))
        assert store.crashed(claim, "x", made_progress=False)
        claim = claimed(store)
        store.add_checkpoint(claim, step + 100, files(f"jobs/x/{step + 100}"))
        store.release(claim)
    assert store.get_job(OWNER, job.id).state is JobState.QUEUED


def test_ten_lost_workers_fail_the_job(store: JobStore) -> None:
    job = training_job(store)
    for _ in range(10):
        assert store.get_job(OWNER, job.id).state is JobState.QUEUED
        expire(store, claimed(store))
        store.sweep()
    failed = store.get_job(OWNER, job.id)
    assert (failed.state, failed.reason) == (JobState.FAILED, "worker_lost")


def test_crashes_and_lost_workers_are_counted_apart(store: JobStore) -> None:
    job = training_job(store)
    for _ in range(2):
        store.crashed(claimed(store), "x", made_progress=False)
    for _ in range(9):
        expire(store, claimed(store))
        store.sweep()
    assert store.get_job(OWNER, job.id).state is JobState.QUEUED


def test_owners_take_turns_whatever_they_queued(store: JobStore) -> None:
    mine, theirs = trained_model(store), trained_model(store, OTHER)
    generation_job(store, mine, parts=6, priority=9)
    generation_job(store, theirs, OTHER, parts=6)
    order = [claimed(store).owner for _ in range(12)]
    assert all(first != second for first, second in itertools.pairwise(order))
    assert order.count(OWNER) == 6


def test_an_owner_gets_the_higher_priority_then_the_loaded_then_the_older_job(store: JobStore) -> None:
    model_id = trained_model(store)
    old = generation_job(store, model_id, parts=2)
    loaded = generation_job(store, model_id, parts=1)
    urgent = generation_job(store, model_id, parts=1, priority=1)
    order = [claimed(store, prefer_job=loaded.id).job_id for _ in range(4)]
    assert order == [urgent.id, loaded.id, old.id, old.id]


def test_avoided_jobs_are_left_to_others(store: JobStore) -> None:
    first, second = training_job(store), training_job(store)
    assert claimed(store, avoid=[first.id]).job_id == second.id
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE, avoid=[first.id]) is None


def test_work_pinned_to_other_numerics_is_left_to_others(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    first = claimed(store, numerics="cpu/A/")
    store.pin_numerics(first, "cpu/A/fp32")
    assert store.claim("w2", ALL_KINDS, lease_seconds=LEASE, numerics="cpu/B/") is None
    second = claimed(store, numerics="cpu/A/")
    assert second.numerics_key == "cpu/A/fp32"
    commit_part(store, first)
    commit_part(store, second)
    finalize = claimed(store, numerics="cpu/B/")
    assert (finalize.job_id, finalize.kind) == (job.id, UnitKind.FINALIZE)


def test_the_first_claim_pins_the_numerics_and_others_are_refused(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    first, second = claimed(store), claimed(store)
    store.pin_numerics(first, "key-a")
    store.pin_numerics(first, "key-a")
    with pytest.raises(NumericsMismatch):
        store.pin_numerics(second, "key-b")
    assert store.get_job(OWNER, job.id).numerics_key == "key-a"


def test_a_pin_without_any_result_gives_way(store: JobStore) -> None:
    job = training_job(store)
    first = claimed(store)
    store.pin_numerics(first, "key-a")
    store.release(first)
    second = claimed(store)
    store.pin_numerics(second, "key-b")
    store.add_checkpoint(second, 1, files("jobs/x/c"))
    store.release(second)
    with pytest.raises(NumericsMismatch):
        store.pin_numerics(claimed(store), "key-a")
    assert store.get_job(OWNER, job.id).numerics_key == "key-b"


def test_a_claim_carries_the_newest_checkpoint(store: JobStore) -> None:
    training_job(store)
    first = claimed(store)
    assert first.checkpoint is None
    store.add_checkpoint(first, 20, files("jobs/x/20"))
    store.add_checkpoint(first, 10, files("jobs/x/10"))
    store.release(first)
    second = claimed(store)
    assert second.checkpoint is not None
    assert (second.checkpoint.step, second.checkpoint.attempt) == (20, 1)
    assert second.checkpoint.stored == files("jobs/x/20")


def test_three_checkpoints_are_kept_and_the_others_keys_handed_back(store: JobStore) -> None:
    job = training_job(store)
    first = claimed(store)
    dropped = [store.add_checkpoint(first, step, files(f"jobs/x/{step}/a1/c")) for step in (1, 2, 3, 4)]
    assert dropped == [(), (), (), ("jobs/x/1/a1/c",)]
    store.release(first)
    assert store.add_checkpoint(claimed(store), 4, files("jobs/x/4/a2/c")) == ("jobs/x/4/a1/c",)
    assert [(found.step, found.attempt) for found in store.checkpoints(OWNER, job.id)] == [(2, 1), (3, 1), (4, 2)]


def test_a_retry_keeps_the_checkpoints(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    store.add_checkpoint(claim, 5, files("jobs/x/5"))
    store.cancel_job(OWNER, job.id)
    store.release(claim)
    store.retry_job(OWNER, job.id)
    again = claimed(store)
    assert again.attempt == 2
    assert again.checkpoint is not None


def test_retrying_while_a_worker_still_stops_gives_it_another_attempt_only_later(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    bad, busy = claimed(store), claimed(store)
    store.fail(bad, "internal", "x")
    store.retry_job(OWNER, job.id)
    assert claimed(store).unit_id == bad.unit_id
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None
    store.release(busy)
    assert claimed(store).unit_id == busy.unit_id


def test_failing_a_unit_withdraws_the_waiting_ones(store: JobStore) -> None:
    generation_job(store, trained_model(store), parts=3)
    store.fail(claimed(store), "model_unavailable", "the model is gone")
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None


def test_a_failure_during_cancelling_ends_in_canceled(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    store.cancel_job(OWNER, job.id)
    store.fail(claim, "internal", "x")
    found = store.get_job(OWNER, job.id)
    assert (found.state, found.error) == (JobState.CANCELED, None)


def test_a_crash_during_cancelling_ends_in_canceled(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    store.cancel_job(OWNER, job.id)
    assert not store.crashed(claim, "signal 9", made_progress=False)
    found = store.get_job(OWNER, job.id)
    assert (found.state, found.reason) == (JobState.CANCELED, None)
    assert "failed" not in [event.type for event in store.events(OWNER, job.id)]


def test_work_on_a_deleted_job_is_lost(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    store.cancel_job(OWNER, job.id)
    store.release(claim)
    store.delete_job(OWNER, job.id)
    with pytest.raises(LeaseLost):
        store.renew(claim, LEASE)


def test_metrics_come_back_by_step_and_a_repeated_step_replaces(store: JobStore) -> None:
    job = training_job(store)
    first = claimed(store)
    store.add_metrics(first, 2, {"loss": 0.5, "lr": 1e-4})
    store.add_metrics(first, 1, {"loss": math.nan})
    store.release(first)
    store.add_metrics(claimed(store), 2, {"loss": 0.25})
    found = store.metrics(OWNER, job.id)
    assert [step for step, _ in found] == [1, 2]
    assert math.isnan(found[0][1]["loss"])
    assert found[1][1] == {"loss": 0.25, "lr": 1e-4}
    assert store.metrics(OWNER, job.id, key="lr", since_step=2) == [(2, {"lr": 1e-4})]


def test_progress_is_reported_with_the_time_left(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    assert store.get_job(OWNER, job.id).progress == Progress("running", 0, 100, None)
    store.renew(claim, LEASE, Progress("training", 10, 100))
    time.sleep(0.2)
    store.renew(claim, LEASE, Progress("training", 20, 100))
    found = store.get_job(OWNER, job.id).progress
    assert (found.stage, found.current, found.total) == ("training", 20, 100)
    assert found.eta_seconds is not None
    # Ten steps took 0.2 s, eighty are left: 1.6 s, and not less, however slow this machine is.
    assert 1.5 < found.eta_seconds < 8.0


def test_generation_progress_counts_pairs_of_parts_in_hand(store: JobStore) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    first = claimed(store)
    store.renew(first, LEASE, Progress("sampling", 25, 50))
    assert store.get_job(OWNER, job.id).progress.current == 2
    commit_part(store, first)
    claimed(store)
    found = store.get_job(OWNER, job.id).progress
    assert (found.current, found.total) == (4, 8)
    assert found.eta_seconds is not None


def test_reporting_the_same_progress_twice_changes_nothing(store: JobStore) -> None:
    job = training_job(store)
    claim = claimed(store)
    store.renew(claim, LEASE, Progress("training", 10, 100))
    version = store.get_job(OWNER, job.id).version
    store.renew(claim, LEASE, Progress("training", 10, 100))
    store.renew(claim, LEASE)
    assert store.get_job(OWNER, job.id).version == version


def test_workers_register_beat_and_leave(store: JobStore) -> None:
    store.register_worker("w1", {"kinds": ["training"]})
    store.register_worker("w2", {})
    store.register_worker("w1", {"kinds": ["generation"]})
    store.heartbeat("w2")
    found = store.list_workers()
    assert sorted((worker.id, str(worker.info)) for worker in found) == [
        ("w1", "{'kinds': ['generation']}"),
        ("w2", "{}"),
    ]
    assert all(0.0 <= worker.idle_seconds < 30.0 for worker in found)
    assert store.list_workers(seen_within=-1.0) == []
    store.remove_worker("w1")
    with pytest.raises(NotFound):
        store.heartbeat("w1")


def test_an_owner_at_the_cap_is_passed_over_until_a_unit_ends(record_url: str) -> None:
    store = JobStore(record_url, owner_running_units=2)
    mine, theirs = trained_model(store), trained_model(store, OTHER)
    generation_job(store, mine, parts=5, priority=9)
    first, second = claimed(store), claimed(store)
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None
    generation_job(store, theirs, OTHER, parts=1)
    assert claimed(store).owner == OTHER
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None
    commit_part(store, first)
    third = claimed(store)
    assert (third.owner, third.index) == (OWNER, 2)
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None
    for claim in (second, third):
        store.release(claim)
    assert [claimed(store).index, claimed(store).index] == [1, 2]
    store.close()


def test_a_turn_is_taken_once_per_interval(store: JobStore) -> None:
    assert store.take_turn("house", 0.3)
    assert not store.take_turn("house", 0.3)
    assert store.take_turn("garden", 60.0)
    time.sleep(0.35)
    assert store.take_turn("house", 0.3)
    assert not store.take_turn("garden", 60.0)


def test_a_wrong_count_of_waiting_units_is_put_right(store: JobStore, record_url: str) -> None:
    job = generation_job(store, trained_model(store), parts=2)
    set_waiting(record_url, 0)
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None
    version = store.get_job(OWNER, job.id).version
    assert store.sweep() == 0
    assert store.get_job(OWNER, job.id).version > version
    assert [claimed(store).index, claimed(store).index] == [0, 1]
    set_waiting(record_url, 7)
    assert store.claim("w", ALL_KINDS, lease_seconds=LEASE) is None
    assert store.queue_summary()[Kind.GENERATION].waiting_units == 0


def set_waiting(url: str, number: int) -> None:
    """What an older version of the code leaves behind."""
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE jobs SET waiting = {number} WHERE kind = 'generation'")
