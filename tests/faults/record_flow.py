"""An owner and a worker of one job, as API and supervisor are, on a record that fails now and then.

Every call is repeated while the record is away. At the end each call that had RETURNED must have counted, and exactly
once; what raised may or may not have. Which way the record fails is the business of the faults that use this.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from cffa_core.errors import LeaseLost, StorageUnavailable
from cffa_core.jobs.records import Claim, Job, Progress
from cffa_core.jobs.spec import GenerationSpec
from cffa_core.jobs.state import TERMINAL, JobState, UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.rng import derive_seed
from tests.record_cases import ALL_KINDS, OWNER, files, part_info

LEASE = 2.0
PARTS = 3
PATIENCE = 120.0

T = TypeVar("T")


class Flow:
    """One generation job from its creation to its end; ``store`` is the failing way to the record."""

    def __init__(self, store: JobStore, model_id: str) -> None:
        self._store = store
        self._model_id = model_id
        self._end = time.monotonic() + PATIENCE
        self.errors = 0
        self.lost = 0
        self.slowest = 0.0
        self.committed: dict[tuple[str, int], int] = {}

    def run(self, key: str) -> Job:
        """Create the job under an idempotency key and do all of its units; returns the job as it ended."""
        spec = GenerationSpec(model_id=self._model_id, count=PARTS, part_size=1, seed=derive_seed(key))
        job, _ = self._insist(lambda: self._store.create_job(OWNER, spec, idempotency_key=key))
        while self._insist(lambda: self._store.get_job(OWNER, job.id)).state not in TERMINAL:
            claim = self._insist(lambda: self._store.claim("w", ALL_KINDS, lease_seconds=LEASE))
            if claim is None:
                self._insist(self._store.sweep)
                time.sleep(0.1)
                continue
            try:
                self._work(claim)
            except LeaseLost:
                self.lost += 1
        return self._insist(lambda: self._store.get_job(OWNER, job.id))

    def _work(self, claim: Claim) -> None:
        progress = Progress("sampling", 1, 2)
        if claim.kind is UnitKind.PART:
            self._insist(lambda: self._store.pin_numerics(claim, "key"))
            self._insist(lambda: self._store.add_metrics(claim, claim.index, {"loss": 0.5}))
        self._insist(lambda: self._store.renew(claim, LEASE, progress))
        if claim.kind is UnitKind.PART:
            key = f"jobs/{claim.job_id}/parts/{claim.index:05d}/a{claim.attempt}"
            stored = files(f"{key}/pairs.zip", f"{key}/part.json")
            self._insist(lambda: self._store.commit(claim, stored, part_info(claim)))
        else:
            self._insist(lambda: self._store.commit(claim, files(), {}, job_result={}))
        self.committed[claim.kind.value, claim.index] = claim.attempt

    def _insist(self, call: Callable[[], T]) -> T:
        """Repeat a call while the record is away; only typed errors are forgiven."""
        while True:
            began = time.monotonic()
            try:
                return call()
            except StorageUnavailable:
                self.errors += 1
                assert time.monotonic() < self._end, "the record never came back"
            finally:
                self.slowest = max(self.slowest, time.monotonic() - began)
            time.sleep(0.05)


def assert_counted_once(store: JobStore, flow: Flow, job: Job) -> None:
    """Judge by a sound way to the record: all that was acknowledged is there, and once."""
    assert job.state is JobState.SUCCEEDED, (job.error, job.reason)
    assert job.counts.generated == PARTS
    parts = {(part.kind.value, part.index): part.attempt for part in store.parts(OWNER, job.id)}
    assert len(parts) == PARTS + 1
    for unit, attempt in flow.committed.items():
        assert parts[unit] == attempt, f"the acknowledged commit of {unit} was replaced"
    events = store.events(OWNER, job.id, limit=1000)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    done: list[Any] = [(event.data["unit"], event.data["index"]) for event in events if event.type == "committed"]
    assert sorted(done) == sorted(parts), "a unit was committed more than once"
    assert sum(event.type == "created" for event in events) == 1
    same = [found for found in store.list_jobs(OWNER, page_size=1000).items if found.spec == job.spec]
    assert len(same) == 1, "an idempotency key made two jobs"
