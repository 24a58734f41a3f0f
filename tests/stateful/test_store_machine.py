"""Random histories of owners and workers against the record, checked against a small model after every step.

``CFFA_SEQUENCES`` is the number of histories on each database.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cffa_core.errors import Conflict, LeaseLost
from cffa_core.jobs.records import Claim, Event, Job, Progress
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import TERMINAL, JobState, UnitKind, UnitState, may_follow
from cffa_core.jobs.store import JobStore
from tests.record_cases import (
    ALL_KINDS,
    LEASE,
    OTHER,
    OWNER,
    commit_part,
    expire,
    files,
    generation_job,
    trained_model,
)
from tests.record_servers import Records

OWNERS = (OWNER, OTHER)
MAX_CRASHES, MAX_EXPIRIES = 3, 4


SEQUENCES = int(os.environ.get("CFFA_SEQUENCES", "8"))
SETTINGS = settings(
    max_examples=SEQUENCES,
    stateful_step_count=35,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


def add_models(store: JobStore) -> None:
    """One model for each owner."""
    for owner in OWNERS:
        trained_model(store, owner)


@pytest.mark.timeout(300 + 20 * SEQUENCES)
def test_the_record_agrees_with_the_model_whatever_happens(records: Records) -> None:
    run_state_machine_as_test(lambda: RecordMachine(records), settings=SETTINGS)


class RecordMachine(RuleBasedStateMachine):
    """``live`` and ``stale`` hold every claim ever made; ``attempts`` the highest attempt seen of each unit."""

    def __init__(self, records: Records) -> None:
        super().__init__()
        self.records = records
        self.url = records.new(add_models)
        self.cap = 0
        self.store = self.open()
        self.models = {owner: self.store.list_models(owner).items[0].id for owner in OWNERS}
        self.jobs: dict[str, str] = {}
        self.live: list[Claim] = []
        self.stale: list[Claim] = []
        self.attempts: dict[str, int] = {}
        self.committed: list[Claim] = []
        self.served: list[str] = []
        self.crashes: dict[str, int] = {}
        self.versions: dict[str, int] = {}

    def open(self) -> JobStore:
        return JobStore(self.url, max_crashes=MAX_CRASHES, max_expiries=MAX_EXPIRIES, owner_running_units=self.cap)

    @initialize(cap=st.sampled_from([0, 0, 2]))
    def limit_owners(self, cap: int) -> None:
        if cap:
            self.store.close()
            self.cap = cap
            self.store = self.open()

    def teardown(self) -> None:
        """No accepted job is lost: with everybody willing, every unfinished job still ends."""
        try:
            self.drain()
        finally:
            self.store.close()
            self.records.drop(self.url)

    def drain(self) -> None:
        for claim in self.live:
            self.store.release(claim)
        for job_id, owner in self.jobs.items():
            if self.store.get_job(owner, job_id).state is JobState.PAUSED:
                self.store.resume_job(owner, job_id)
        while (claim := self.store.claim("last", ALL_KINDS, lease_seconds=LEASE)) is not None:
            self.finish(claim)
        for job_id, owner in self.jobs.items():
            job = self.store.get_job(owner, job_id)
            assert job.state in TERMINAL
            if job.state is JobState.SUCCEEDED:
                assert job.counts.generated == job.counts.requested
                assert [part.kind for part in self.store.parts(owner, job_id)].count(UnitKind.FINALIZE) == 1

    # --- owners ---------------------------------------------------------------------------------------------------

    @rule(owner=st.sampled_from(OWNERS), parts=st.integers(1, 3), priority=st.integers(0, 1))
    def create(self, owner: str, parts: int, priority: int) -> None:
        job = generation_job(self.store, self.models[owner], owner, parts=parts, priority=priority)
        self.jobs[job.id] = owner

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), ask=st.sampled_from(["cancel", "pause", "resume", "retry"]))
    def steer(self, data: st.DataObject, ask: str) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        before = self.store.get_job(self.jobs[job_id], job_id)
        act: Callable[[str, str], Job] = getattr(self.store, f"{ask}_job")
        try:
            act(before.owner, job_id)
        except Conflict:
            assert self.store.get_job(before.owner, job_id) == before
        else:
            if ask == "retry":
                self.crashes = {unit: n for unit, n in self.crashes.items() if not unit.startswith(job_id)}

    @precondition(lambda self: self.jobs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.jobs)))
        busy = any(claim.job_id == job_id for claim in self.live)
        over = self.store.get_job(self.jobs[job_id], job_id).state in TERMINAL
        try:
            self.store.delete_job(self.jobs[job_id], job_id)
        except Conflict:
            assert busy or not over
        else:
            assert over
            assert not busy
            del self.jobs[job_id]

    # --- workers --------------------------------------------------------------------------------------------------

    @rule()
    def claim(self) -> None:
        units = {owner: self.waiting_units(owner) for owner in OWNERS}
        load = self.store.load()
        assert load.units[Kind.GENERATION, UnitState.QUEUED] == sum(units.values())
        assert load.units[Kind.GENERATION, UnitState.RUNNING] == len(self.live)
        assert (load.oldest_seconds[Kind.GENERATION] > 0.0) == any(units.values())
        running = Counter(claim.owner for claim in self.live)
        waiting = {owner for owner in OWNERS if units[owner] and (not self.cap or running[owner] < self.cap)}
        claim = self.store.claim("w", ALL_KINDS, lease_seconds=LEASE)
        if claim is None:
            assert not waiting
            return
        assert claim.owner in waiting
        if len(waiting) == 2 and self.served:
            assert claim.owner != self.served[-1], "the other owner's turn"
        assert claim.attempt == self.attempts.get(claim.unit_id, 0) + 1
        assert claim.unit_id not in {held.unit_id for held in self.live}
        self.attempts[claim.unit_id] = claim.attempt
        self.served.append(claim.owner)
        self.live.append(claim)

    def waiting_units(self, owner: str) -> int:
        """From what the record says of its jobs, not of its queue."""
        found = 0
        for job_id, job_owner in self.jobs.items():
            if job_owner != owner:
                continue
            job = self.store.get_job(owner, job_id)
            held = {(claim.kind, claim.index) for claim in self.live if claim.job_id == job_id}
            done = {(part.kind, part.index) for part in self.store.parts(owner, job_id)}
            if job.state in (JobState.QUEUED, JobState.RUNNING, JobState.FINALIZING):
                found += len(set(self.store.footprint(job_id).units) - held - done)
        return found

    def end(self, data: st.DataObject) -> Claim:
        claim = data.draw(st.sampled_from(self.live))
        self.live.remove(claim)
        self.stale.append(claim)
        return claim

    def finish(self, claim: Claim) -> Job:
        if claim.kind is UnitKind.PART:
            return commit_part(self.store, claim)
        return self.store.commit(claim, files(), {}, job_result={"pairs": 4})

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        claim = self.end(data)
        before = self.store.get_job(claim.owner, claim.job_id)
        if before.state in TERMINAL or before.state is JobState.CANCELING:
            with pytest.raises(LeaseLost):
                self.finish(claim)
            assert self.store.get_job(claim.owner, claim.job_id).counts.generated == before.counts.generated
        else:
            after = self.finish(claim)
            self.committed.append(claim)
            assert after.counts.generated == before.counts.generated + (4 if claim.kind is UnitKind.PART else 0)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.store.release(self.end(data))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), progress=st.integers(0, 50))
    def renew(self, data: st.DataObject, progress: int) -> None:
        claim = data.draw(st.sampled_from(self.live))
        order = self.store.renew(claim, LEASE, Progress("sampling", progress, 50))
        state = self.store.get_job(claim.owner, claim.job_id).state
        stop = state in TERMINAL or state is JobState.CANCELING
        assert order == ("cancel" if stop else "pause" if state is JobState.PAUSING else "continue")

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        claim = self.end(data)
        over = self.store.renew(claim, LEASE) == "cancel"
        unit = f"{claim.job_id}/{claim.unit_id}"
        self.crashes[unit] = self.crashes.get(unit, 0) + 1
        alive = self.store.crashed(claim, "signal 9", made_progress=False)
        assert alive == (not over and self.crashes[unit] < MAX_CRASHES)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        claim = self.end(data)
        self.store.fail(claim, "internal", "x")
        assert self.store.get_job(claim.owner, claim.job_id).state in (*TERMINAL, JobState.CANCELING)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def lose_worker(self, data: st.DataObject) -> None:
        expire(self.store, self.end(data))
        assert self.store.sweep() == 1

    @rule()
    def sweep(self) -> None:
        assert self.store.sweep() == 0

    @precondition(lambda self: self.stale)
    @rule(data=st.data(), write=st.sampled_from(["commit", "renew", "release", "crash", "fail", "checkpoint"]))
    def write_late(self, data: st.DataObject, write: str) -> None:
        claim = data.draw(st.sampled_from(self.stale))
        before = self.picture()
        repeated = write == "commit" and claim in self.committed and claim.job_id in self.jobs
        with contextlib.nullcontext() if repeated else pytest.raises(LeaseLost):
            {
                "commit": lambda: self.finish(claim),
                "renew": lambda: self.store.renew(claim, LEASE),
                "release": lambda: self.store.release(claim),
                "crash": lambda: self.store.crashed(claim, "late", made_progress=True),
                "fail": lambda: self.store.fail(claim, "late", "late"),
                "checkpoint": lambda: self.store.add_checkpoint(claim, 1, files("jobs/x/late")),
            }[write]()
        assert self.picture() == before

    def picture(self) -> list[tuple[Job, list[Event], dict[tuple[UnitKind, int], tuple[int, bool]]]]:
        """Everything the record says of every job."""
        return [
            (
                self.store.get_job(owner, job_id),
                self.store.events(owner, job_id, limit=10_000),
                self.store.footprint(job_id).units,
            )
            for job_id, owner in self.jobs.items()
        ]

    # --- what holds after every step ------------------------------------------------------------------------------

    @invariant()
    def the_record_agrees_with_the_model(self) -> None:
        for job_id, owner in self.jobs.items():
            job = self.store.get_job(owner, job_id)
            assert job.version >= self.versions.get(job_id, -1)
            if job.version == self.versions.get(job_id):
                continue  # nothing happened to this one
            self.versions[job_id] = job.version
            units = self.store.footprint(job_id).units
            held = {(claim.kind, claim.index): claim.attempt for claim in self.live if claim.job_id == job.id}
            assert {unit: attempt for unit, (attempt, live) in units.items() if live} == held
            self.check_history(job, self.store.events(owner, job_id, limit=10_000))
            parts = self.store.parts(job.owner, job.id)
            done = [part for part in parts if part.kind is UnitKind.PART]
            assert job.counts.generated == 4 * len(done)
            finalize = [unit for unit in units if unit[0] is UnitKind.FINALIZE]
            assert len(finalize) == (len(done) == len(units) - len(finalize))
            assert (job.state is JobState.SUCCEEDED) == any(part.kind is UnitKind.FINALIZE for part in parts)
            assert (job.result is not None) == (job.state is JobState.SUCCEEDED)
            assert job.state is not JobState.CANCELING or held
            assert job.state is not JobState.PAUSING or held

    def check_history(self, job: Job, history: list[Event]) -> None:
        state = JobState.QUEUED
        for number, event in enumerate(history, start=1):
            assert event.seq == number
            if event.type == "state":
                assert JobState(event.data["before"]) is state
                after = JobState(event.data["after"])
                assert may_follow(state, after)
                state = after
        assert job.state is state
