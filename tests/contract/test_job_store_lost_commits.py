"""PostgreSQL: a connection lost at COMMIT changes neither what an operation answers nor how often it happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from cffa_core.errors import StorageUnavailable
from cffa_core.jobs.spec import Kind, TrainingSpec
from cffa_core.jobs.state import JobState
from cffa_core.jobs.store import JobStore
from tests.commit_proxy import CommitProxy, When, commit_proxy
from tests.record_cases import (
    ALL_KINDS,
    LEASE,
    OWNER,
    add_dataset,
    claimed,
    commit_part,
    expire,
    files,
    generation_job,
    trained_model,
    training_job,
)
from tests.record_servers import PostgresRecords

Act = Callable[[JobStore], object]


@pytest.fixture
def url(postgres_records: PostgresRecords) -> Iterator[str]:
    made = postgres_records.new()
    yield made
    postgres_records.drop(made)


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    opened = JobStore(url)
    yield opened
    opened.close()


@pytest.fixture
def proxy(url: str) -> Iterator[CommitProxy]:
    with commit_proxy(sa.make_url(url).port or 0) as opened:
        yield opened


@pytest.fixture
def shaky(url: str, proxy: CommitProxy) -> Iterator[JobStore]:
    opened = JobStore(sa.make_url(url).set(port=proxy.port).render_as_string(hide_password=False))
    opened.ping()  # the first connection asks what the server is like, in a transaction of its own
    yield opened
    opened.close()


def creating(store: JobStore, key: str | None) -> tuple[Act, Act]:
    spec = TrainingSpec(dataset_id=add_dataset(store))
    return (
        lambda shaky: shaky.create_job(OWNER, spec, idempotency_key=key)[1],
        lambda store: [job.state for job in store.list_jobs(OWNER).items] == [JobState.QUEUED],
    )


def claiming(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    return (
        lambda shaky: claimed(shaky).attempt == 1,
        lambda store: next(iter(store.footprint(job.id).units.values())) == (1, True),
    )


def committing(store: JobStore) -> tuple[Act, Act]:
    job = generation_job(store, trained_model(store), parts=1)
    claim = claimed(store)
    return (
        lambda shaky: commit_part(shaky, claim).state is JobState.FINALIZING,
        lambda store: store.get_job(OWNER, job.id).counts.generated == 4 and happened(store, job.id)["committed"] == 1,
    )


def checkpointing(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    claim = claimed(store)
    for step in (1, 2, 3):
        store.add_checkpoint(claim, step, files(f"jobs/x/{step}"))
    return (
        lambda shaky: shaky.add_checkpoint(claim, 4, files("jobs/x/4")) == ("jobs/x/1",),
        lambda store: [found.step for found in store.checkpoints(OWNER, job.id)] == [2, 3, 4],
    )


def releasing(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    claim = claimed(store)
    return (
        lambda shaky: shaky.release(claim) is None,
        lambda store: happened(store, job.id)["released"] == 1 and claimed(store).attempt == 2,
    )


def crashing(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    claim = claimed(store)
    return (
        lambda shaky: shaky.crashed(claim, "signal 9", made_progress=False),
        lambda store: happened(store, job.id)["crashed"] == 1,
    )


def failing(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    claim = claimed(store)
    return (
        lambda shaky: shaky.fail(claim, "internal", "x") is None,
        lambda store: store.get_job(OWNER, job.id).state is JobState.FAILED,
    )


def renewing(store: JobStore) -> tuple[Act, Act]:
    training_job(store)
    claim = claimed(store)
    return lambda shaky: shaky.renew(claim, LEASE) == "continue", lambda store: store.sweep() == 0


def retrying(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    store.cancel_job(OWNER, job.id)
    return (
        lambda shaky: shaky.retry_job(OWNER, job.id).state is JobState.QUEUED,
        lambda store: claimed(store).job_id == job.id,
    )


def deleting(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    claim = claimed(store)
    store.add_checkpoint(claim, 1, files("jobs/x/1"))
    store.release(claim)
    store.cancel_job(OWNER, job.id)
    return (
        lambda shaky: shaky.delete_job(OWNER, job.id) == ("jobs/x/1",),
        lambda store: store.list_jobs(OWNER).items == (),
    )


def adding_data(store: JobStore) -> tuple[Act, Act]:
    return add_dataset, lambda store: len(store.list_datasets(OWNER).items) == 1


def taking_a_turn(store: JobStore) -> tuple[Act, Act]:
    return lambda shaky: shaky.take_turn("house", 60.0), lambda store: not store.take_turn("house", 60.0)


def sweeping(store: JobStore) -> tuple[Act, Act]:
    job = training_job(store)
    expire(store, claimed(store))
    return lambda shaky: shaky.sweep() == 1, lambda store: happened(store, job.id)["worker_lost"] == 1


def happened(store: JobStore, job_id: str) -> Counter[str]:
    return Counter(event.type for event in store.events(OWNER, job_id, limit=1000))


PREPARED: dict[str, Callable[[JobStore], tuple[Act, Act]]] = {
    "create": lambda store: creating(store, None),
    "create with a key": lambda store: creating(store, "k"),
    "claim": claiming,
    "commit": committing,
    "checkpoint": checkpointing,
    "release": releasing,
    "crash": crashing,
    "fail": failing,
    "renew": renewing,
    "retry": retrying,
    "delete": deleting,
    "data set": adding_data,
    "turn": taking_a_turn,
    "sweep": sweeping,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("operation", list(PREPARED))
def test_a_commit_without_an_answer_happens_once(
    store: JobStore, shaky: JobStore, proxy: CommitProxy, operation: str, when: When
) -> None:
    act, check = PREPARED[operation](store)
    proxy.arm(when)
    assert act(shaky)
    assert proxy.made == 1
    assert check(store)


def test_an_operation_repeated_by_its_caller_after_all_tries_failed(
    store: JobStore, shaky: JobStore, proxy: CommitProxy
) -> None:
    """The worker's and the client's own repetition: the same commit, the same idempotency key."""
    spec = TrainingSpec(dataset_id=add_dataset(store), steps=100)
    proxy.arm("before", cuts=4)
    with pytest.raises(StorageUnavailable):
        shaky.create_job(OWNER, spec, idempotency_key="k")
    assert store.list_jobs(OWNER).items == ()
    proxy.arm("after", cuts=0)
    job, created = shaky.create_job(OWNER, spec, idempotency_key="k")
    assert created
    claim = shaky.claim("w", ALL_KINDS, lease_seconds=LEASE)
    assert claim is not None
    shaky.commit(claim, files("jobs/x/model.json"), {})
    again = shaky.commit(claim, files("jobs/x/model.json"), {})
    assert (again.id, again.state) == (job.id, JobState.FINALIZING)
    assert store.queue_summary()[Kind.TRAINING].waiting_units == 1
