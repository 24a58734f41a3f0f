"""Quotas inside the record's transactions, on each database: what is counted, and that nobody slips past the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cffa_core.errors import CffaError, NotFound, QuotaExceeded, TooManyActiveJobs
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import EvaluationSpec, GenerationSpec
from cffa_core.jobs.store import JobStore
from cffa_core.jobs.upload_rows import AnnouncedFile
from cffa_core.people.accounts import Accounts
from cffa_core.people.quotas import Limits, Usage
from cffa_core.storage.base import ObjectInfo
from tests.record_cases import (
    OTHER,
    OWNER,
    add_dataset,
    claimed,
    commit_part,
    evaluation_job,
    files,
    trained_model,
    training_job,
)

Open = Callable[..., JobStore]
POSTS = 20


@pytest.fixture
def opened(record_url: str) -> Iterator[Open]:
    """Opens stores of one record, each with limits of its own, as replicas of a service have."""
    stores: list[JobStore] = []

    def open_store(**limits: int) -> JobStore:
        stores.append(JobStore(record_url, limits=Limits(**limits)))
        return stores[-1]

    yield open_store
    for store in stores:
        store.close()


def usage(store: JobStore, owner: str = OWNER) -> Usage:
    return Accounts(store.database, b"").usage(owner)


def outcomes(work: Callable[[int], object]) -> list[str]:
    """What twenty calls at the same moment ended with: ``made`` or the name of an error."""

    def run(index: int) -> str:
        try:
            work(index)
        except CffaError as error:
            return type(error).__name__
        return "made"

    with ThreadPoolExecutor(POSTS) as pool:
        return sorted(pool.map(run, range(POSTS)))


def posting(stores: list[JobStore], count: int | None = None) -> Callable[[int], object]:
    """Posts jobs through one store or another: generation of ``count`` pairs, or evaluations."""
    if count is not None:
        spec: GenerationSpec | EvaluationSpec = GenerationSpec(model_id=trained_model(stores[0]), count=count)
    else:
        pairs, reference = add_dataset(stores[0]), add_dataset(stores[0])
        spec = EvaluationSpec(pairs_dataset_id=pairs, reference_dataset_id=reference)
    return lambda index: stores[index % len(stores)].create_job(OWNER, spec)


def test_twenty_posts_at_once_do_not_pass_the_limit_of_active_jobs(opened: Open) -> None:
    stores = [opened(active_jobs=3), opened(active_jobs=3)]
    assert outcomes(posting(stores)) == ["TooManyActiveJobs"] * 17 + ["made"] * 3
    assert usage(stores[0]).active_jobs == 3


def test_twenty_posts_at_once_do_not_pass_the_limit_of_pairs(opened: Open) -> None:
    stores = [opened(pairs=35), opened(pairs=35)]
    assert outcomes(posting(stores, count=10)) == ["QuotaExceeded"] * 17 + ["made"] * 3
    assert usage(stores[0]).pairs == 30


def test_without_limits_nobody_is_refused(opened: Open) -> None:
    assert outcomes(posting([opened()])) == ["made"] * POSTS


def test_twenty_data_sets_at_once_do_not_pass_the_limit_of_bytes(opened: Open) -> None:
    stores = [opened(bytes=8), opened(bytes=8)]  # each data set here has three bytes
    assert outcomes(lambda index: add_dataset(stores[index % 2])) == ["QuotaExceeded"] * 18 + ["made"] * 2
    assert usage(stores[0]) == Usage(0, 0, 6)


def test_limits_are_per_owner(opened: Open) -> None:
    store = opened(active_jobs=1)
    evaluation_job(store)
    with pytest.raises(TooManyActiveJobs):
        evaluation_job(store)
    evaluation_job(store, OTHER)


def test_an_account_may_have_more_or_less(opened: Open) -> None:
    store = opened(active_jobs=1)
    people = Accounts(store.database, b"")
    people.create_account(OWNER, {"active_jobs": 2})
    evaluation_job(store)
    evaluation_job(store)
    with pytest.raises(TooManyActiveJobs, match="2 of 2"):
        evaluation_job(store)
    people.set_limits(OWNER, {"active_jobs": 0})
    evaluation_job(store)


def test_a_job_that_is_over_makes_room_and_retry_takes_it(opened: Open) -> None:
    store = opened(active_jobs=1)
    first = evaluation_job(store)
    store.cancel_job(OWNER, first.id)
    second = evaluation_job(store)
    with pytest.raises(TooManyActiveJobs):
        store.retry_job(OWNER, first.id)
    store.cancel_job(OWNER, second.id)
    store.retry_job(OWNER, first.id)


def test_a_replayed_post_needs_no_room(opened: Open) -> None:
    store = opened(active_jobs=1)
    spec = EvaluationSpec(pairs_dataset_id=add_dataset(store), reference_dataset_id=add_dataset(store))
    made, _ = store.create_job(OWNER, spec, idempotency_key="once")
    again, created = store.create_job(OWNER, spec, idempotency_key="once")
    assert again.id == made.id and not created


def test_deleting_a_generation_job_gives_its_pairs_back(opened: Open) -> None:
    store = opened(pairs=8)
    spec = GenerationSpec(model_id=trained_model(store), count=8, part_size=4)
    job, _ = store.create_job(OWNER, spec)
    store.cancel_job(OWNER, job.id)
    with pytest.raises(QuotaExceeded, match="8 pairs more than the 8"):
        store.create_job(OWNER, spec)
    store.delete_job(OWNER, job.id)
    store.create_job(OWNER, spec)


def test_bytes_are_those_of_data_sets_models_and_products_each_object_once(opened: Open) -> None:
    store = opened()
    model_id = trained_model(store)
    # A data set, a model (its job's unit names the same file), and the finalize unit's manifest.
    assert usage(store) == Usage(0, 0, 3 + 3 + 3)
    store.create_job(OWNER, GenerationSpec(model_id=model_id, count=8, part_size=4))
    commit_part(store, claimed(store))
    assert usage(store) == Usage(1, 8, 9 + 6)
    assert usage(store, OTHER) == Usage(0, 0, 0)


def test_a_data_set_that_shares_objects_costs_nothing_more(opened: Open) -> None:
    store = opened(bytes=5)
    first = store.get_dataset(OWNER, add_dataset(store))

    def add(stored: StoredFiles) -> None:
        store.add_dataset(
            OWNER, dataset_id=store.new_id("ds"), name="b", digest="1" * 64, pairs=1, report={}, stored=stored
        )

    add(first.stored)
    with pytest.raises(QuotaExceeded, match="6 stored bytes are over the limit of 5"):
        add(files("datasets/another/dataset.json"))
    assert len(store.list_datasets(OWNER).items) == 2


def test_a_checkpoint_counts(opened: Open) -> None:
    store = opened()
    training_job(store)
    claim = claimed(store)
    store.add_checkpoint(claim, 10, StoredFiles({"a": ObjectInfo("k/a", 100, "ab" * 32)}))
    assert usage(store).bytes == 3 + 100


def test_no_job_starts_once_the_bytes_are_used_up(opened: Open) -> None:
    evaluation_job(opened())
    with pytest.raises(QuotaExceeded, match="stored bytes"):
        store = opened(bytes=6)
        ids = [item.id for item in store.list_datasets(OWNER).items]
        store.create_job(OWNER, EvaluationSpec(pairs_dataset_id=ids[0], reference_dataset_id=ids[1]))


def test_uploads_that_have_begun_count_for_other_uploads(opened: Open) -> None:
    store = opened(bytes=10)
    coming = [AnnouncedFile("cf/a.png", 6, "uploads/a")]
    store.add_upload(OWNER, store.new_id("up"), "a", coming, {}, seconds=60)
    assert usage(store).bytes == 6
    with pytest.raises(QuotaExceeded):
        store.add_upload(OWNER, store.new_id("up"), "b", coming, {}, seconds=60)
    store.require_bytes(OWNER, 4)
    with pytest.raises(QuotaExceeded, match="5 bytes more than the 6"):
        store.require_bytes(OWNER, 5)
    add_dataset(store)  # what an upload becomes is not counted beside it


def test_an_unknown_job_is_not_found_whatever_the_limits(opened: Open) -> None:
    with pytest.raises(NotFound):
        opened(active_jobs=1).retry_job(OWNER, "job_00000000000000000000")
