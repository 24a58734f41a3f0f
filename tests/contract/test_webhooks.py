"""Web hooks in the record, on each database: one delivery per change, leases, outcomes, switching off, redelivery."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from cffa_core.errors import Conflict, InvalidSpec, NotFound
from cffa_core.jobs.service_tables import deliveries, post_keys, webhooks
from cffa_core.jobs.store import JobStore
from cffa_core.webhooks.addresses import Policy
from cffa_core.webhooks.backoff import Backoff
from cffa_core.webhooks.messages import EventType
from cffa_core.webhooks.records import Delivery, DeliveryState, Due, NewSecret, NewWebhook, Outcome
from cffa_core.webhooks.store import Webhooks
from tests.commit_proxy import When, commit_proxy
from tests.record_cases import (
    OTHER,
    OWNER,
    add_dataset,
    claimed,
    commit_part,
    generated_pairs,
    generation_job,
    trained_model,
    training_job,
)
from tests.record_servers import PostgresRecords

URL = "https://receiver.example/hook"
OK = Outcome(status=204, error=None, seconds=0.1)
REFUSED = Outcome(status=500, error=None, seconds=0.1)
NO_ANSWER = Outcome(status=None, error="no answer", seconds=15.0)


@pytest.fixture
def hooks(store: JobStore) -> Webhooks:
    # Every try after the first is due at once.
    return Webhooks(store.database, Policy(), backoff=Backoff(first=1e-9, longest=1e-9, tries=3), give_up_after=2)


def hook(hooks: Webhooks, *events: EventType, owner: str = OWNER) -> str:
    return hooks.create(owner, URL, events).hook.id


def listed(hooks: Webhooks, webhook_id: str, owner: str = OWNER) -> list[Delivery]:
    return list(reversed(hooks.deliveries(owner, webhook_id, page_size=1000).items))


def told(hooks: Webhooks, webhook_id: str) -> list[str]:
    return [delivery.type for delivery in listed(hooks, webhook_id)]


def take(hooks: Webhooks, lease_seconds: float = 30.0) -> Due:
    (due,) = hooks.claim(10, lease_seconds=lease_seconds)
    return due


def send(hooks: Webhooks, outcome: Outcome, times: int = 1) -> None:
    for _ in range(times):
        hooks.record(take(hooks), outcome)


def test_a_job_is_announced_from_start_to_end(store: JobStore, hooks: Webhooks) -> None:
    model_id = trained_model(store)
    everything, failures = hook(hooks), hook(hooks, EventType.JOB_FAILED, EventType.DATASET_CREATED)
    job_id = generated_pairs(store, model_id, parts=3)
    add_dataset(store)
    assert told(hooks, everything) == ["job.started", "job.succeeded", "dataset.created"]
    assert told(hooks, failures) == ["dataset.created"]
    started, succeeded, created = listed(hooks, everything)
    assert (started.body["data"]["state"], succeeded.body["data"]["state"]) == ("running", "succeeded")
    assert succeeded.body["data"] == {
        "id": job_id,
        "kind": "generation",
        "state": "succeeded",
        "counts": succeeded.body["data"]["counts"],
        "error_code": None,
        "links": {"self": f"/v1/jobs/{job_id}"},
    }
    assert succeeded.body["data"]["counts"]["generated"] == 12
    assert succeeded.body["timestamp"].endswith("Z")
    assert set(created.body["data"]) == {"id", "pairs", "links"}


def test_other_ends_and_what_a_message_never_says(store: JobStore, hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    job = training_job(store)
    store.pause_job(OWNER, job.id)
    store.resume_job(OWNER, job.id)
    store.release(claimed(store))
    store.fail(claimed(store), "training_diverged", "a secret of patient 17")
    store.retry_job(OWNER, job.id)
    store.cancel_job(OWNER, job.id)
    assert told(hooks, webhook_id) == ["dataset.created", "job.paused", "job.started", "job.failed", "job.canceled"]
    failed = listed(hooks, webhook_id)[3]
    assert failed.body["data"]["error_code"] == "training_diverged"
    said = json.dumps([delivery.body for delivery in listed(hooks, webhook_id)])
    for hidden in ("patient", "retinas", "spec", "dataset_id", "owner", OWNER):
        assert hidden not in said


def test_only_the_owners_enabled_hooks_hear_of_it(store: JobStore, hooks: Webhooks) -> None:
    foreign, off, on = hook(hooks, owner=OTHER), hook(hooks), hook(hooks)
    hooks.update(OWNER, off, enabled=False)
    add_dataset(store)
    assert [told(hooks, off), told(hooks, on)] == [[], ["dataset.created"]]
    assert listed(hooks, foreign, OTHER) == []


def test_a_job_of_many_parts_is_two_messages(store: JobStore, hooks: Webhooks) -> None:
    model_id = trained_model(store)
    webhook_id = hook(hooks)
    generation_job(store, model_id, parts=30)
    for _ in range(30):
        commit_part(store, claimed(store))
    store.release(claimed(store))
    assert told(hooks, webhook_id) == ["job.started"]


def test_one_message_to_two_hooks_has_one_id(store: JobStore, hooks: Webhooks) -> None:
    first, second = hook(hooks), hook(hooks)
    add_dataset(store)
    assert listed(hooks, first)[0].message_id == listed(hooks, second)[0].message_id
    assert listed(hooks, first)[0].id != listed(hooks, second)[0].id


def test_a_lease_that_ran_out_is_sent_again_under_the_same_message_id(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    first = take(hooks, lease_seconds=-1.0)
    second = take(hooks)
    assert (second.delivery_id, second.message_id, second.tries) == (first.delivery_id, first.message_id, 2)
    assert hooks.record(first, OK) == "lost"
    assert hooks.record(second, OK) == "delivered"
    assert hooks.record(second, OK) == "lost"
    assert hooks.claim(10, lease_seconds=30) == []
    (delivery,) = listed(hooks, webhook_id)
    assert (delivery.state, delivery.tries, delivery.status, delivery.due_at) == (DeliveryState.DELIVERED, 2, 204, None)


def test_a_sender_that_always_dies_does_not_try_for_ever(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    for _ in range(3):
        take(hooks, lease_seconds=-1.0)
    assert hooks.claim(10, lease_seconds=30) == []
    assert listed(hooks, webhook_id)[0].state is DeliveryState.FAILED
    assert hooks.get(OWNER, webhook_id).failures == 1


def test_one_delivery_of_a_hook_at_a_time_and_no_hook_waits_for_another(hooks: Webhooks) -> None:
    busy, quiet = hook(hooks), hook(hooks)
    for _ in range(3):
        hooks.trial(OWNER, busy)
    held = take(hooks)
    hooks.trial(OWNER, quiet)
    assert [due.webhook_id for due in hooks.claim(10, lease_seconds=30)] == [quiet]
    hooks.record(held, OK)
    assert [due.webhook_id for due in hooks.claim(10, lease_seconds=30)] == [busy]
    assert (hooks.backlog().waiting, hooks.backlog().sending) == (1, 2)


def test_no_owner_waits_for_anothers_hooks(hooks: Webhooks) -> None:
    for webhook_id in [hook(hooks) for _ in range(10)]:
        hooks.trial(OWNER, webhook_id)
        hooks.trial(OWNER, webhook_id)
    late = [hook(hooks, owner=OTHER) for _ in range(2)]
    for webhook_id in late:
        hooks.trial(OTHER, webhook_id)
    taken = hooks.claim(3, lease_seconds=30)
    assert [due.webhook_id in late for due in taken] == [False, False, True]
    more = hooks.claim(8, lease_seconds=30)
    assert (
        sum(due.webhook_id in late for due in more) == 1 and len(more) == 3
    )  # four of one owner, and all of the other
    assert hooks.claim(8, lease_seconds=30) == []
    hooks.record(taken[0], Outcome(204, None, 0.1))
    assert len(hooks.claim(8, lease_seconds=30)) == 1


def test_a_claim_takes_no_more_than_there_is_room_for(hooks: Webhooks) -> None:
    for _ in range(3):
        hooks.trial(OWNER, hook(hooks))
    assert [len(hooks.claim(room, lease_seconds=30)) for room in (0, 2, 2, 2)] == [0, 2, 1, 0]


def test_tries_then_giving_up_then_switched_off(store: JobStore, hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    for _ in range(3):
        hooks.trial(OWNER, webhook_id)
    send(hooks, REFUSED)
    assert listed(hooks, webhook_id)[0].state is DeliveryState.WAITING
    send(hooks, NO_ANSWER, times=2)
    first = listed(hooks, webhook_id)[0]
    assert (first.state, first.tries, first.status, first.error) == (DeliveryState.FAILED, 3, None, "no answer")
    assert hooks.get(OWNER, webhook_id).enabled
    send(hooks, REFUSED, times=3)
    now = hooks.get(OWNER, webhook_id)
    assert (now.enabled, now.failures) == (False, 2)
    assert now.reason is not None and "in a row" in now.reason
    last = listed(hooks, webhook_id)[2]
    assert (last.state, last.tries, last.error) == (DeliveryState.FAILED, 0, "the web hook is switched off")
    assert hooks.claim(10, lease_seconds=30) == []
    with pytest.raises(Conflict, match="switched off"):
        hooks.trial(OWNER, webhook_id)
    again = hooks.update(OWNER, webhook_id, enabled=True)
    assert (again.enabled, again.failures, again.reason) == (True, 0, None)


def test_a_delivery_in_between_starts_the_count_anew(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    for outcome in (REFUSED, OK, REFUSED):
        hooks.trial(OWNER, webhook_id)
        send(hooks, outcome, times=1 if outcome is OK else 3)
    assert (hooks.get(OWNER, webhook_id).enabled, hooks.get(OWNER, webhook_id).failures) == (True, 1)


def test_gone_switches_off_at_once(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    assert hooks.record(take(hooks), Outcome(status=410, error=None, seconds=0.1)) == "failed"
    found = hooks.get(OWNER, webhook_id)
    assert not found.enabled and found.reason is not None and "410" in found.reason


def test_a_pause_that_was_asked_for_is_kept(store: JobStore) -> None:
    hooks = Webhooks(store.database, Policy())
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    due = take(hooks)
    assert hooks.record(due, Outcome(status=503, error=None, seconds=0.1, retry_after=500.0)) == "again"
    (delivery,) = listed(hooks, webhook_id)
    assert delivery.due_at is not None
    assert 490 < (delivery.due_at - delivery.created_at).total_seconds() < 520
    assert hooks.claim(10, lease_seconds=30) == []


def test_switched_off_while_it_is_sent(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    due = take(hooks)
    hooks.update(OWNER, webhook_id, enabled=False)
    assert hooks.record(due, REFUSED) == "failed"
    assert hooks.get(OWNER, webhook_id).failures == 0


def test_deleted_while_it_is_sent(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    due = take(hooks)
    hooks.delete(OWNER, webhook_id)
    assert hooks.record(due, OK) == "lost"
    with pytest.raises(NotFound):
        hooks.deliveries(OWNER, webhook_id)


def test_redelivery_keeps_the_message_and_its_id(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    send(hooks, OK)
    (old,) = listed(hooks, webhook_id)
    new = hooks.redeliver(OWNER, webhook_id, old.id)
    assert (new.message_id, new.body, new.state, new.tries) == (old.message_id, old.body, DeliveryState.WAITING, 0)
    due = take(hooks)
    with pytest.raises(Conflict, match="being sent"):
        hooks.redeliver(OWNER, webhook_id, new.id)
    hooks.record(due, OK)
    assert Counter(delivery.state for delivery in listed(hooks, webhook_id)) == {DeliveryState.DELIVERED: 2}


def test_a_delivery_that_waits_long_is_made_due(store: JobStore) -> None:
    hooks = Webhooks(store.database, Policy(), backoff=Backoff(first=3600.0))
    webhook_id = hook(hooks)
    hooks.trial(OWNER, webhook_id)
    send(hooks, REFUSED)
    assert hooks.claim(10, lease_seconds=30) == []
    (waiting,) = listed(hooks, webhook_id)
    assert hooks.redeliver(OWNER, webhook_id, waiting.id).id == waiting.id
    assert take(hooks).tries == 2


def test_every_call_is_the_owners_alone(hooks: Webhooks) -> None:
    webhook_id, own = hook(hooks), hook(hooks, owner=OTHER)
    delivery = hooks.trial(OWNER, webhook_id)
    calls = [
        lambda: hooks.get(OTHER, webhook_id),
        lambda: hooks.update(OTHER, webhook_id, enabled=False),
        lambda: hooks.delete(OTHER, webhook_id),
        lambda: hooks.rotate_secret(OTHER, webhook_id),
        lambda: hooks.deliveries(OTHER, webhook_id),
        lambda: hooks.delivery(OTHER, webhook_id, delivery.id),
        lambda: hooks.redeliver(OTHER, webhook_id, delivery.id),
        lambda: hooks.trial(OTHER, webhook_id),
        lambda: hooks.delivery(OTHER, own, delivery.id),
        lambda: hooks.redeliver(OTHER, own, delivery.id),
    ]
    for call in calls:
        with pytest.raises(NotFound):
            call()
    assert [found.id for found in hooks.page(OTHER).items] == [own]


def test_secrets_change_over(hooks: Webhooks) -> None:
    new = hooks.create(OWNER, URL)
    made, first = new.hook, new.secret
    second = hooks.rotate_secret(OWNER, made.id).secret
    hooks.trial(OWNER, made.id)
    due = take(hooks)
    assert due.secrets == (second, first)
    assert first not in repr(hooks.get(OWNER, made.id))
    hooks.record(due, OK)
    third = hooks.rotate_secret(OWNER, made.id).secret
    fourth = hooks.rotate_secret(OWNER, made.id, keep_previous=False).secret
    hooks.trial(OWNER, made.id)
    assert take(hooks).secrets == (fourth,)
    assert len({first, second, third, fourth}) == 4


def test_one_key_makes_one_hook(store: JobStore, hooks: Webhooks) -> None:
    events = [EventType.JOB_FAILED, EventType.JOB_STARTED]
    made = hooks.create(OWNER, URL, events, idempotency_key="k")
    assert made.secret is not None and not made.replayed
    again = hooks.create(OWNER, URL, events[::-1], idempotency_key="k")
    assert again == NewWebhook(made.hook, made.secret, replayed=True)
    for url, wanted in ((URL + "/2", events), (URL, [])):
        with pytest.raises(Conflict) as caught:
            hooks.create(OWNER, url, wanted, idempotency_key="k")
        assert [problem.code for problem in caught.value.problems] == ["idempotency_key_reused"]
    others = [hooks.create(OTHER, URL, events, idempotency_key="k"), hooks.create(OWNER, URL, events)]
    assert len({made.hook.id, *(other.hook.id for other in others)}) == 3

    changed = hooks.update(OWNER, made.hook.id, url=URL + "/2")
    assert hooks.create(OWNER, URL, events, idempotency_key="k") == NewWebhook(changed, made.secret, replayed=True)
    hooks.delete(OWNER, made.hook.id)
    anew = hooks.create(OWNER, URL, idempotency_key="k")
    assert not anew.replayed and anew.hook.id != made.hook.id


def test_a_repetition_tells_the_first_secret_for_a_day_and_no_other_ever(store: JobStore, hooks: Webhooks) -> None:
    def again(key: str) -> str | None:
        found = hooks.create(OWNER, URL, idempotency_key=key)
        assert found.replayed
        return found.secret

    made = {key: hooks.create(OWNER, URL, idempotency_key=key) for key in ("rotated", "replaced", "old")}
    hooks.rotate_secret(OWNER, made["rotated"].hook.id)
    hooks.rotate_secret(OWNER, made["replaced"].hook.id, keep_previous=False)
    assert [again(key) for key in made] == [None, None, made["old"].secret]
    aged = webhooks.c.created_at - 86_000
    store.database.write(lambda connection: connection.execute(webhooks.update().values(created_at=aged)))
    assert again("old") == made["old"].secret
    store.database.write(lambda connection: connection.execute(webhooks.update().values(created_at=aged)))
    assert again("old") is None


def test_one_key_rotates_once_and_tells_its_secret_for_a_day_until_the_next(store: JobStore, hooks: Webhooks) -> None:
    webhook_id, other = hook(hooks), hook(hooks)

    def rotate(key: str = "k", **more: bool) -> NewSecret:
        return hooks.rotate_secret(OWNER, webhook_id, idempotency_key=key, **more)

    first = rotate()
    assert not first.replayed and rotate() == NewSecret(first.secret, replayed=True)
    hooks.trial(OWNER, webhook_id)
    due = take(hooks)
    assert due.secrets[0] == first.secret and len(due.secrets) == 2, "the one before it is still the one before it"
    calls: list[Callable[[], object]] = [
        lambda: rotate(keep_previous=False),
        lambda: hooks.rotate_secret(OWNER, other, idempotency_key="k"),
    ]
    for call in calls:
        with pytest.raises(Conflict) as caught:
            call()
        assert [problem.code for problem in caught.value.problems] == ["idempotency_key_reused"]
    with pytest.raises(NotFound):
        hooks.rotate_secret(OTHER, webhook_id, idempotency_key="k")

    second = rotate("k2")
    assert second.secret not in (None, first.secret) and rotate() == NewSecret(None, replayed=True)
    assert rotate("k2").secret == second.secret
    aged = post_keys.update().values(at=post_keys.c.at - 87_000)
    store.database.write(lambda connection: connection.execute(aged))
    assert rotate("k2") == NewSecret(None, replayed=True)


def test_posts_with_one_key_at_once_make_one_hook(hooks: Webhooks) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: hooks.create(OWNER, URL, idempotency_key="k"), range(8)))
    assert len({new.hook.id for new in made}) == len({new.secret for new in made}) == 1
    assert [new.replayed for new in made].count(False) == 1
    assert len(hooks.page(OWNER).items) == 1


def test_changes(hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    changed = hooks.update(OWNER, webhook_id, url=URL + "/2", events=[EventType.JOB_FAILED])
    assert (changed.url, changed.events, changed.enabled) == (URL + "/2", ("job.failed",), True)
    assert hooks.update(OWNER, webhook_id) == changed
    with pytest.raises(InvalidSpec):
        hooks.update(OWNER, webhook_id, url="https://127.0.0.1/")
    assert hooks.get(OWNER, webhook_id) == changed


def test_there_is_a_limit(hooks: Webhooks) -> None:
    for _ in range(20):
        hook(hooks)
    with pytest.raises(Conflict, match="20"):
        hook(hooks)
    hook(hooks, owner=OTHER)


def test_pages(hooks: Webhooks) -> None:
    made = [hook(hooks) for _ in range(3)]
    page = hooks.page(OWNER, page_size=2)
    rest = hooks.page(OWNER, page_size=2, page_token=page.next_token)
    assert [found.id for found in (*page.items, *rest.items)] == made[::-1]
    for _ in range(3):
        hooks.trial(OWNER, made[0])
    send(hooks, OK)
    delivered = hooks.deliveries(OWNER, made[0], state=DeliveryState.DELIVERED, page_size=1)
    assert (len(delivered.items), delivered.next_token) == (1, None)
    waiting = hooks.deliveries(OWNER, made[0], state=DeliveryState.WAITING, page_size=1)
    assert waiting.next_token is not None
    with pytest.raises(InvalidSpec):
        hooks.deliveries(OWNER, made[0], page_token="x")


def test_lateness_and_what_is_forgotten(store: JobStore, hooks: Webhooks) -> None:
    webhook_id = hook(hooks)
    assert (hooks.backlog().waiting, hooks.backlog().late_seconds) == (0, 0.0)
    for _ in range(2):
        hooks.trial(OWNER, webhook_id)
    send(hooks, OK)
    store.database.write(
        lambda connection: connection.execute(
            deliveries.update().values(due_at=deliveries.c.due_at - 100, finished_at=deliveries.c.finished_at - 100)
        )
    )
    assert 100 <= hooks.backlog().late_seconds < 130
    assert [hooks.forget(200), hooks.forget(50), hooks.forget(50)] == [0, 1, 0]
    assert [delivery.state for delivery in listed(hooks, webhook_id)] == [DeliveryState.WAITING]


@pytest.fixture
def postgres_url(postgres_records: PostgresRecords) -> Iterator[str]:
    made = postgres_records.new()
    yield made
    postgres_records.drop(made)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_without_an_answer_happens_once(postgres_url: str, when: When) -> None:
    store = JobStore(postgres_url)
    steady = Webhooks(store.database, Policy())
    with commit_proxy(sa.make_url(postgres_url).port or 0) as proxy:
        through = sa.make_url(postgres_url).set(port=proxy.port).render_as_string(hide_password=False)
        shaky_store = JobStore(through)
        shaky = Webhooks(shaky_store.database, Policy())
        shaky_store.ping()

        def cut() -> None:
            proxy.arm(when)

        cut()
        webhook_id = shaky.create(OWNER, URL, idempotency_key="k").hook.id
        assert [found.id for found in steady.page(OWNER).items] == [webhook_id]
        job = training_job(store)
        cut()
        claim = claimed(shaky_store)
        cut()
        shaky_store.fail(claim, "internal", "x")
        assert told(steady, webhook_id) == ["dataset.created", "job.started", "job.failed"]
        cut()
        add_dataset(shaky_store)
        assert told(steady, webhook_id)[3:] == ["dataset.created"]
        cut()
        due = take(shaky)
        assert due.tries == 1
        cut()
        shaky.record(due, OK)
        found = steady.delivery(OWNER, webhook_id, due.delivery_id)
        assert (found.state, found.tries) == (DeliveryState.DELIVERED, 1)
        cut()
        shaky.redeliver(OWNER, webhook_id, due.delivery_id)
        cut()
        shaky.trial(OWNER, webhook_id)
        assert len(told(steady, webhook_id)) == 6
        cut()
        new = shaky.rotate_secret(OWNER, webhook_id, idempotency_key="k")
        assert take(steady).secrets[0] == new.secret and not new.replayed
        cut()
        shaky.delete(OWNER, webhook_id)
        assert proxy.made == 1
        assert steady.page(OWNER).items == ()
        assert store.get_job(OWNER, job.id).state == "failed"
        shaky_store.close()
    store.close()
