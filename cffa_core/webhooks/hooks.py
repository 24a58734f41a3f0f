"""Statements on web hooks and their deliveries as their owner sees them; each takes the caller's open connection.

How deliveries come about is in ``outbox``, how they are sent and end in ``due``. Lock order: hook, then delivery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import Conflict, NotFound, Problem
from cffa_core.jobs import post_keys
from cffa_core.jobs.post_keys import REPEATED_SECONDS, Post
from cffa_core.jobs.records import Page
from cffa_core.jobs.rows import as_page, moment, new_id, page_limits
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import deliveries, webhook_keys, webhooks
from cffa_core.webhooks.messages import TEST, trial_body
from cffa_core.webhooks.outbox import new_delivery
from cffa_core.webhooks.records import Delivery, DeliveryState, NewSecret, NewWebhook, Webhook

HOOKS_PER_OWNER = 20
SWITCHED_OFF = "the web hook is switched off"


def create(
    connection: sa.Connection,
    owner: str,
    webhook_id: str,
    url: str,
    events: Sequence[str],
    secret: str,
    key: str | None = None,
) -> NewWebhook:
    """See :meth:`Webhooks.create`; run again after a lost COMMIT it finds what it wrote."""
    known = connection.execute(sa.select(webhooks).where(webhooks.c.id == webhook_id)).one_or_none()
    if known is not None:
        return NewWebhook(_webhook_of(known), secret)
    body_sha256 = _sha256(json.dumps([url, list(events)]))
    if key is not None and (made := _replayed(connection, owner, key, body_sha256)) is not None:
        return made
    number = connection.scalar(sa.select(sa.func.count()).where(webhooks.c.owner == owner)) or 0
    if number >= HOOKS_PER_OWNER:
        raise Conflict(f"there are {number} web hooks, which is the limit; remove one first")
    connection.execute(
        webhooks.insert().values(
            id=webhook_id,
            owner=owner,
            url=url,
            events=list(events),
            secret=secret,
            enabled=True,
            failures=0,
            created_at=clock(),
        )
    )
    if key is not None:
        posted = {"owner": owner, "key": key, "body_sha256": body_sha256, "secret_sha256": _sha256(secret)}
        connection.execute(webhook_keys.insert().values({**posted, "webhook_id": webhook_id}))
    return NewWebhook(get(connection, owner, webhook_id), secret)


def _replayed(connection: sa.Connection, owner: str, key: str, body_sha256: str) -> NewWebhook | None:
    """What this key made before, or None; the secret is left out if it is no longer the one of then, or old."""
    posted = connection.execute(
        sa.select(webhook_keys).where(webhook_keys.c.owner == owner, webhook_keys.c.key == key)
    ).one_or_none()
    if posted is None:
        return None
    if posted.body_sha256 != body_sha256:
        message = f"the idempotency key {key!r} was used with another web hook; use a new key"
        raise Conflict(message, problems=(Problem("Idempotency-Key", "idempotency_key_reused", message),))
    row = _row(connection, owner, posted.webhook_id)
    now = connection.scalar(sa.select(clock())) or 0.0
    secret = str(row.secret.split(" ")[0])
    told = _sha256(secret) == posted.secret_sha256 and now - row.created_at < REPEATED_SECONDS
    return NewWebhook(_webhook_of(row), secret if told else None, replayed=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def get(connection: sa.Connection, owner: str, webhook_id: str) -> Webhook:
    """See :meth:`Webhooks.get`."""
    return _webhook_of(_row(connection, owner, webhook_id))


def page(connection: sa.Connection, owner: str, page_size: int, page_token: str | None) -> Page[Webhook]:
    """See :meth:`Webhooks.page`."""
    size, below = page_limits(page_size, page_token)
    query = sa.select(webhooks).where(webhooks.c.owner == owner).order_by(webhooks.c.number.desc()).limit(size + 1)
    if below is not None:
        query = query.where(webhooks.c.number < below)
    rows = connection.execute(query).all()
    return as_page([_webhook_of(row) for row in rows], [row.number for row in rows], size)


def update(connection: sa.Connection, owner: str, webhook_id: str, changes: dict[str, Any]) -> Webhook:
    """See :meth:`Webhooks.update`."""
    _row(connection, owner, webhook_id, lock=True)
    if changes.get("enabled"):
        changes = {**changes, "failures": 0, "reason": None}
    if changes:
        connection.execute(webhooks.update().where(webhooks.c.id == webhook_id).values(changes))
    if changes.get("enabled") is False:
        drop_waiting(connection, webhook_id)
    return get(connection, owner, webhook_id)


def delete(connection: sa.Connection, owner: str, webhook_id: str) -> None:
    """See :meth:`Webhooks.delete`; its deliveries go with it."""
    _row(connection, owner, webhook_id)
    connection.execute(webhooks.delete().where(webhooks.c.id == webhook_id))


def is_gone(connection: sa.Connection, webhook_id: str) -> bool:
    """Whether a hook is not there; waits for a removal that is under way."""
    return connection.scalar(sa.select(webhooks.c.id).where(webhooks.c.id == webhook_id).with_for_update()) is None


def rotate(
    connection: sa.Connection, owner: str, webhook_id: str, secret: str, keep_previous: bool, post: Post | None
) -> NewSecret:
    """See :meth:`Webhooks.rotate_secret`; the column holds one secret or two, the newest first."""
    row = _row(connection, owner, webhook_id, lock=True)
    newest = row.secret.split(" ")[0]
    if newest == secret:
        return NewSecret(secret)  # an earlier try was committed after all
    if post is not None:  # its mark says which secret it gave: that one is told again as long as it is the newest
        made = post_keys.note(connection, replace(post, mark=_sha256(secret)), webhook_id)
        if made is not None:
            told = made.recent and made.mark == _sha256(newest)
            return NewSecret(newest if told else None, made.replayed)
    both = f"{secret} {newest}" if keep_previous else secret
    connection.execute(webhooks.update().where(webhooks.c.id == webhook_id).values(secret=both))
    return NewSecret(secret)


def deliveries_of(
    connection: sa.Connection,
    owner: str,
    webhook_id: str,
    state: DeliveryState | None,
    page_size: int,
    page_token: str | None,
) -> Page[Delivery]:
    """See :meth:`Webhooks.deliveries`."""
    size, below = page_limits(page_size, page_token)
    _row(connection, owner, webhook_id)
    query = sa.select(deliveries).where(deliveries.c.webhook_id == webhook_id)
    if state is not None:
        query = query.where(deliveries.c.state == state.value)
    if below is not None:
        query = query.where(deliveries.c.number < below)
    rows = connection.execute(query.order_by(deliveries.c.number.desc()).limit(size + 1)).all()
    return as_page([_delivery_of(row) for row in rows], [row.number for row in rows], size)


def delivery(connection: sa.Connection, owner: str, webhook_id: str, delivery_id: str) -> Delivery:
    """See :meth:`Webhooks.delivery`."""
    _row(connection, owner, webhook_id)
    row = connection.execute(
        sa.select(deliveries).where(deliveries.c.id == delivery_id, deliveries.c.webhook_id == webhook_id)
    ).one_or_none()
    if row is None:
        raise NotFound(f"no delivery {delivery_id} of web hook {webhook_id}")
    return _delivery_of(row)


def redeliver(connection: sa.Connection, owner: str, webhook_id: str, delivery_id: str, new: str) -> Delivery:
    """See :meth:`Webhooks.redeliver`; ``new`` is the id of the delivery that is made, one for all tries of this."""
    _enabled(connection, owner, webhook_id)
    if _exists(connection, new):
        return delivery(connection, owner, webhook_id, new)
    found = delivery(connection, owner, webhook_id, delivery_id)
    if found.state is DeliveryState.SENDING:
        raise Conflict(f"delivery {delivery_id} is being sent right now; look again in a minute")
    if found.state is DeliveryState.WAITING:
        own = (deliveries.c.id == delivery_id, deliveries.c.state == DeliveryState.WAITING.value)
        connection.execute(deliveries.update().where(*own).values(due_at=clock()))
        return delivery(connection, owner, webhook_id, delivery_id)
    now = connection.scalar(sa.select(clock())) or 0.0
    body = connection.scalar(sa.select(deliveries.c.body).where(deliveries.c.id == delivery_id)) or ""
    made = new_delivery(webhook_id, found.message_id, found.type, body, now)
    connection.execute(deliveries.insert().values({**made, "id": new}))
    return delivery(connection, owner, webhook_id, new)


def trial(connection: sa.Connection, owner: str, webhook_id: str, new: str) -> Delivery:
    """See :meth:`Webhooks.trial`; ``new`` as in :func:`redeliver`."""
    _enabled(connection, owner, webhook_id)
    if not _exists(connection, new):
        now = connection.scalar(sa.select(clock())) or 0.0
        made = new_delivery(webhook_id, new_id("msg"), TEST, trial_body(now, webhook_id), now)
        connection.execute(deliveries.insert().values({**made, "id": new}))
    return delivery(connection, owner, webhook_id, new)


def drop_waiting(connection: sa.Connection, webhook_id: str) -> None:
    """End what waits for a hook that was switched off; its owner may redeliver it."""
    connection.execute(
        deliveries.update()
        .where(deliveries.c.webhook_id == webhook_id, deliveries.c.state == DeliveryState.WAITING.value)
        .values(state=DeliveryState.FAILED.value, error=SWITCHED_OFF, due_at=None, finished_at=clock())
    )


def _row(connection: sa.Connection, owner: str, webhook_id: str, *, lock: bool = False) -> sa.Row[Any]:
    query = sa.select(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.owner == owner)
    if lock:  # not against new deliveries, which only need the row to be there
        query = query.with_for_update(key_share=True)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFound(f"no web hook {webhook_id}")
    return row


def _enabled(connection: sa.Connection, owner: str, webhook_id: str) -> None:
    if not _row(connection, owner, webhook_id, lock=True).enabled:
        raise Conflict(f"web hook {webhook_id} is switched off; switch it on first")


def _exists(connection: sa.Connection, delivery_id: str) -> bool:
    return connection.scalar(sa.select(deliveries.c.id).where(deliveries.c.id == delivery_id)) is not None


def _webhook_of(row: sa.Row[Any]) -> Webhook:
    return Webhook(
        id=row.id,
        owner=row.owner,
        url=row.url,
        events=tuple(row.events),
        enabled=row.enabled,
        reason=row.reason,
        failures=row.failures,
        created_at=moment(row.created_at),
    )


def _delivery_of(row: sa.Row[Any]) -> Delivery:
    return Delivery(
        id=row.id,
        webhook_id=row.webhook_id,
        message_id=row.message_id,
        type=row.type,
        state=DeliveryState(row.state),
        tries=row.tries,
        due_at=None if row.due_at is None else moment(row.due_at),
        status=row.status,
        error=row.error,
        seconds=row.seconds,
        created_at=moment(row.created_at),
        finished_at=None if row.finished_at is None else moment(row.finished_at),
        body=json.loads(row.body),
    )
