"""Whatever waits, the place a job is told is the order in which claims then begin jobs."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from tests.record_cases import claimed, generation_job, trained_model, training_job
from tests.record_servers import Records

OWNERS = ("clinic-a", "clinic-b", "Clinic-C")
EXAMPLES = max(8, int(os.environ.get("CFFA_SEQUENCES", "8")) // 10)

jobs_to_make = st.lists(
    st.tuples(st.sampled_from(OWNERS), st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=7
)


@pytest.mark.timeout(300 + 20 * EXAMPLES)
def test_claims_follow_the_places_that_were_told(records: Records) -> None:
    def add_models(store: JobStore) -> None:
        for owner in OWNERS:
            trained_model(store, owner)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
    @given(made=jobs_to_make, begun=st.integers(0, 5), held=st.integers(0, 6))
    def check(made: list[tuple[str, int, int]], begun: int, held: int) -> None:
        url = records.new(add_models)
        store = JobStore(url)
        try:
            compare(store, made, begun, held)
        finally:
            store.close()
            records.drop(url)

    check()


def compare(store: JobStore, made: list[tuple[str, int, int]], begun: int, held: int) -> None:
    models = {owner: store.list_models(owner).items[0].id for owner in OWNERS}
    jobs = [generation_job(store, models[owner], owner, parts=parts, priority=pri) for owner, parts, pri in made]
    training_job(store, OWNERS[0], priority=9)  # another kind has a queue of its own
    for _ in range(min(begun, sum(parts for _, parts, _ in made))):
        store.claim("w", [Kind.GENERATION], lease_seconds=30.0)
    if held < len(jobs) and store.get_job(jobs[held].owner, jobs[held].id).state is JobState.QUEUED:
        store.pause_job(jobs[held].owner, jobs[held].id)
    found = [store.get_job(job.owner, job.id) for job in jobs]
    places = {job.id: job.queue_position for job in found if job.queue_position is not None}
    assert set(places) == {job.id for job in found if job.state is JobState.QUEUED}
    order: list[str] = []
    while (claim := store.claim("w", [Kind.GENERATION], lease_seconds=30.0)) is not None:
        if claim.job_id in places and claim.job_id not in order:
            order.append(claim.job_id)
    assert [places[job_id] for job_id in order] == list(range(1, len(places) + 1))
    assert claimed(store).spec.kind is Kind.TRAINING
