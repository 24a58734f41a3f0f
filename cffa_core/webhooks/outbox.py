"""The outbox: deliveries are written in the very transaction that changes what they tell of.

So a change and its messages happen together or not at all, also where a transaction is run again after its COMMIT got
no answer. Sending is another matter (``due``). Each function takes the caller's open write transaction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from cffa_core.jobs.rows import counts_of, new_id
from cffa_core.jobs.schema import clock, jobs
from cffa_core.jobs.service_tables import deliveries, webhooks
from cffa_core.jobs.state import JobState
from cffa_core.webhooks.messages import OF_STATE, EventType, dataset_body, job_body
from cffa_core.webhooks.records import DeliveryState

Move = tuple[JobState, float]
"""A state that a job entered, and when."""


def announced(notes: Sequence[Mapping[str, Any]], entered: Mapping[str, float]) -> list[Move]:
    """The moves among new lines of a job's history that are announced.

    ``entered`` are the states that the job was in before: that it runs is said once, not each time it is taken up.
    """
    moves = [(JobState(note["data"]["after"]), note["at"]) for note in notes if note["type"] == "state"]
    known = {JobState.RUNNING} if JobState.RUNNING.value in entered else set()
    return [(state, at) for state, at in moves if state in OF_STATE and state not in known]


def announce_job(connection: sa.Connection, job_id: str, owner: str, moves: Sequence[Move]) -> None:
    """Write a delivery per move and hook that wants to hear of it; one query if the owner has no hook."""
    hooks = _listening(connection, owner)
    if not hooks:
        return
    row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
    for state, at in moves:
        event_type = OF_STATE[state]
        _put(connection, hooks, event_type, job_body(event_type, state, at, row, counts_of(row)), at)


def announce_dataset(connection: sa.Connection, owner: str, dataset_id: str, pairs: int) -> None:
    """Write a delivery to each hook that wants to hear of new data sets."""
    hooks = _listening(connection, owner)
    if hooks:
        now = connection.scalar(sa.select(clock())) or 0.0
        _put(connection, hooks, EventType.DATASET_CREATED, dataset_body(now, dataset_id, pairs), now)


def new_delivery(webhook_id: str, message_id: str, event_type: str, body: str, now: float) -> dict[str, Any]:
    """Columns of a delivery that is due at once."""
    return {
        "id": new_id("dlv"),
        "webhook_id": webhook_id,
        "message_id": message_id,
        "type": event_type,
        "body": body,
        "state": DeliveryState.WAITING.value,
        "tries": 0,
        "due_at": now,
        "created_at": now,
    }


def _listening(connection: sa.Connection, owner: str) -> list[tuple[str, frozenset[str]]]:
    """The owner's hooks and what they want, held against removal until the transaction ends."""
    query = sa.select(webhooks.c.id, webhooks.c.events).where(webhooks.c.owner == owner, webhooks.c.enabled)
    locked = query.order_by(webhooks.c.number).with_for_update(read=True, key_share=True)
    return [(row.id, frozenset(row.events)) for row in connection.execute(locked)]


def _put(
    connection: sa.Connection, hooks: Sequence[tuple[str, frozenset[str]]], event_type: str, body: str, now: float
) -> None:
    message_id = new_id("msg")
    rows = [
        new_delivery(webhook_id, message_id, event_type, body, now)
        for webhook_id, wanted in hooks
        if not wanted or event_type in wanted
    ]
    if rows:
        connection.execute(deliveries.insert(), rows)
