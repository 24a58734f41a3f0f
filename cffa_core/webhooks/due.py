"""Statements of the sender: take deliveries that are due, under a lease, and write down what each try gave.

At least once: a sender that dies between sending and writing leaves a lease that runs out, and the message is sent
again with the same ``webhook-id``. At most one delivery of a hook is sent at a time, so that a slow receiver keeps
nobody else waiting. Database clock only.
"""

from __future__ import annotations

from typing import Any, Literal

import sqlalchemy as sa

from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import deliveries, webhooks
from cffa_core.webhooks.backoff import Backoff
from cffa_core.webhooks.hooks import SWITCHED_OFF, drop_waiting
from cffa_core.webhooks.records import Backlog, DeliveryState, Due, Outcome

Ending = Literal["delivered", "again", "failed", "lost"]
"""What became of a delivery: tried ``again`` later; ``lost``: it is no longer the caller's."""

_OPEN = (DeliveryState.WAITING.value, DeliveryState.SENDING.value)
_IS_DUE = (deliveries.c.state.in_(_OPEN), deliveries.c.due_at <= clock())
FORGOTTEN_AT_ONCE = 1000
OF_ONE_OWNER = 4
"""Deliveries of one owner that are sent at a time, by all processes together."""


def any_due(connection: sa.Connection) -> bool:
    """Whether there is something to claim: a cheap read before the write."""
    return connection.scalar(sa.select(deliveries.c.id).where(*_IS_DUE).limit(1)) is not None


def claim(
    connection: sa.Connection, room: int, lease_seconds: float, backoff: Backoff, give_up_after: int
) -> list[Due]:
    """Take at most ``room`` deliveries, one per hook, for ``lease_seconds``; owners in turn, few of each at a time."""
    rows = connection.execute(
        sa.select(deliveries)
        .where(deliveries.c.number.in_(_next(room)), *_IS_DUE)
        .order_by(deliveries.c.number)
        .with_for_update(skip_locked=True)
    ).all()
    taken = []
    for row in rows:
        hook = connection.execute(sa.select(webhooks).where(webhooks.c.id == row.webhook_id)).one()
        if not hook.enabled:
            _end(connection, row.id, state=DeliveryState.FAILED.value, error=SWITCHED_OFF)
        elif backoff.pause(row.tries) is None and row.tries > 0:
            _give_up(connection, hook, give_up_after)
            _end(connection, row.id, state=DeliveryState.FAILED.value, error="the sender ended while it was sending")
        else:
            taken.append(_take(connection, row, hook, lease_seconds))
    return taken


def _next(room: int) -> sa.Select[int]:
    """Numbers of the deliveries that come next: the oldest of each hook that is not busy. An owner's first one comes
    before another's second, and what is being sent of an owner counts."""
    number, owner = deliveries.c.number, webhooks.c.owner
    of_hooks = deliveries.join(webhooks, webhooks.c.id == deliveries.c.webhook_id)
    is_sent = (deliveries.c.state == DeliveryState.SENDING.value, deliveries.c.due_at > clock())
    busy = sa.select(deliveries.c.webhook_id).where(*is_sent)
    sent = sa.select(owner, sa.func.count().label("many")).select_from(of_hooks).where(*is_sent).group_by(owner)
    has = sent.subquery()
    first = (
        sa.select(owner, sa.func.min(number).label("number"))
        .select_from(of_hooks)
        .where(*_IS_DUE, deliveries.c.webhook_id.not_in(busy))
        .group_by(deliveries.c.webhook_id, owner)
        .subquery()
    )
    place = sa.func.row_number().over(partition_by=first.c.owner, order_by=first.c.number)
    turns = (
        sa.select(first.c.number, (place + sa.func.coalesce(has.c.many, 0)).label("turn"))
        .select_from(first.outerjoin(has, has.c.owner == first.c.owner))
        .subquery()
    )
    in_turn = sa.select(turns.c.number).where(turns.c.turn <= OF_ONE_OWNER)
    return in_turn.order_by(turns.c.turn, turns.c.number).limit(room)


def _take(connection: sa.Connection, row: sa.Row[Any], hook: sa.Row[Any], lease_seconds: float) -> Due:
    lease_ends = connection.execute(
        deliveries.update()
        .where(deliveries.c.id == row.id)
        .values(state=DeliveryState.SENDING.value, tries=row.tries + 1, due_at=clock() + lease_seconds)
        .returning(deliveries.c.due_at)
    ).scalar_one()
    return Due(
        delivery_id=row.id,
        webhook_id=hook.id,
        message_id=row.message_id,
        url=hook.url,
        secrets=tuple(hook.secret.split(" ")),
        body=row.body,
        tries=row.tries + 1,
        lease_ends=lease_ends or 0.0,
    )


def holds(connection: sa.Connection, taken: list[Due]) -> bool:
    """Whether a claim took effect; waits for one that is being committed."""
    query = sa.select(deliveries.c.id).where(
        deliveries.c.id == taken[0].delivery_id,
        deliveries.c.state == DeliveryState.SENDING.value,
        deliveries.c.due_at == taken[0].lease_ends,
    )
    return connection.scalar(query.with_for_update()) is not None


def record(connection: sa.Connection, due: Due, outcome: Outcome, backoff: Backoff, give_up_after: int) -> Ending:
    """Write down what a try gave, unless the lease ran out and somebody else has the delivery."""
    hook = connection.execute(
        sa.select(webhooks).where(webhooks.c.id == due.webhook_id).with_for_update(key_share=True)
    ).one_or_none()
    own = (
        deliveries.c.id == due.delivery_id,
        deliveries.c.state == DeliveryState.SENDING.value,
        deliveries.c.tries == due.tries,
    )
    held = sa.select(deliveries.c.id).where(*own).with_for_update()
    if hook is None or connection.scalar(held) is None:
        return "lost"
    said = {"status": outcome.status, "error": outcome.error, "seconds": outcome.seconds}
    if outcome.delivered:
        _end(connection, due.delivery_id, state=DeliveryState.DELIVERED.value, **said)
        connection.execute(webhooks.update().where(webhooks.c.id == hook.id).values(failures=0))
        return "delivered"
    pause = backoff.pause(due.tries, outcome.retry_after)
    if outcome.gone:
        _switch_off(connection, hook.id, "the receiver answered 410 Gone: it wants no more messages")
    elif pause is not None and hook.enabled:
        values = {"state": DeliveryState.WAITING.value, "due_at": clock() + pause, **said}
        connection.execute(deliveries.update().where(deliveries.c.id == due.delivery_id).values(values))
        return "again"
    elif hook.enabled:
        _give_up(connection, hook, give_up_after)
    _end(connection, due.delivery_id, state=DeliveryState.FAILED.value, **said)
    return "failed"


def backlog(connection: sa.Connection) -> Backlog:
    """See :meth:`Webhooks.backlog`."""
    count = sa.func.count()
    counts = {
        row.state: row.number
        for row in connection.execute(
            sa.select(deliveries.c.state, count.label("number"))
            .where(deliveries.c.state.in_(_OPEN))
            .group_by(deliveries.c.state)
        )
    }
    late = connection.scalar(sa.select(clock() - sa.func.min(deliveries.c.due_at)).where(deliveries.c.state.in_(_OPEN)))
    return Backlog(
        waiting=counts.get(DeliveryState.WAITING.value, 0),
        sending=counts.get(DeliveryState.SENDING.value, 0),
        late_seconds=max(0.0, late or 0.0),
    )


def forget(connection: sa.Connection, seconds: float) -> int:
    """Remove some deliveries that are over for longer than ``seconds``; returns how many."""
    over = deliveries.c.state.in_((DeliveryState.DELIVERED.value, DeliveryState.FAILED.value))
    old = sa.select(deliveries.c.number).where(over, deliveries.c.finished_at < clock() - seconds)
    done = connection.execute(deliveries.delete().where(deliveries.c.number.in_(old.limit(FORGOTTEN_AT_ONCE))))
    return done.rowcount


def _end(connection: sa.Connection, delivery_id: str, **values: Any) -> None:
    connection.execute(
        deliveries.update().where(deliveries.c.id == delivery_id).values(due_at=None, finished_at=clock(), **values)
    )


def _give_up(connection: sa.Connection, hook: sa.Row[Any], give_up_after: int) -> None:
    """Count a delivery that was given up, and switch the hook off after so many in a row."""
    failures = hook.failures + 1
    connection.execute(webhooks.update().where(webhooks.c.id == hook.id).values(failures=failures))
    if failures >= give_up_after:
        _switch_off(connection, hook.id, f"{failures} deliveries in a row were given up")


def _switch_off(connection: sa.Connection, webhook_id: str, reason: str) -> None:
    connection.execute(webhooks.update().where(webhooks.c.id == webhook_id).values(enabled=False, reason=reason))
    drop_waiting(connection, webhook_id)
