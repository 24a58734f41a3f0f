"""Web hooks of a record: their owners' calls, and the sender's. The statements live next door (``hooks``, ``due``).

Deliveries are made by the record itself when a job or data set changes (``outbox``). Knows neither HTTP nor sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from cffa_core.jobs.database import Database
from cffa_core.jobs.post_keys import Makes, Post
from cffa_core.jobs.records import Page
from cffa_core.jobs.rows import new_id
from cffa_core.settings import Settings
from cffa_core.webhooks import due, hooks, signing
from cffa_core.webhooks.addresses import Policy
from cffa_core.webhooks.backoff import Backoff
from cffa_core.webhooks.due import Ending
from cffa_core.webhooks.messages import EventType
from cffa_core.webhooks.records import Backlog, Delivery, DeliveryState, Due, NewSecret, NewWebhook, Outcome, Webhook


class Webhooks:
    """All reads and writes of web hooks; safe to share between threads, one per process.

    ``policy`` says which URLs are taken, ``backoff`` when a delivery is tried again; after ``give_up_after`` deliveries
    in a row that were given up, a hook is switched off. Every method that takes an ``owner`` raises :class:`NotFound`
    for another owner's ids.
    """

    @classmethod
    def of(cls, database: Database, settings: Settings) -> Self:
        """Web hooks as ``CFFA_WEBHOOK_*`` says; raises :class:`InvalidSettings`."""
        backoff = Backoff(
            settings.webhook_first_pause_seconds, settings.webhook_longest_pause_seconds, settings.webhook_tries
        )
        return cls(database, Policy.of(settings), backoff=backoff, give_up_after=settings.webhook_give_up_after)

    def __init__(
        self, database: Database, policy: Policy, *, backoff: Backoff | None = None, give_up_after: int = 5
    ) -> None:
        self._db = database
        self.policy = policy
        self._backoff = backoff or Backoff()
        self._give_up_after = give_up_after

    # --- what an owner does ---------------------------------------------------------------------------------------

    def create(
        self, owner: str, url: str, events: Sequence[EventType] = (), *, idempotency_key: str | None = None
    ) -> NewWebhook:
        """Make a hook for these event types (none: all); its secret is not shown again.

        The same ``idempotency_key`` with the same URL and events returns the hook that it made, as it is now, and for
        a day its first secret too, since the answer that showed it may have been lost. Raises :class:`InvalidSpec` for
        a URL that is not sent to, :class:`Conflict` if the owner has too many hooks, and with the code
        ``idempotency_key_reused`` for a key that was used with something else.
        """
        self.policy.target(url)
        webhook_id, secret = new_id("wh"), signing.new_secret()
        wanted = sorted({event.value for event in events})

        def create(connection: sa.Connection) -> NewWebhook:
            return hooks.create(connection, owner, webhook_id, url, wanted, secret, idempotency_key)

        try:
            return self._db.write(create)
        except IntegrityError:  # the same key was written by another process just now
            return self._db.write(create)

    def get(self, owner: str, webhook_id: str) -> Webhook:
        """One hook of this owner."""
        return self._db.read(lambda connection: hooks.get(connection, owner, webhook_id))

    def page(self, owner: str, page_size: int = 50, page_token: str | None = None) -> Page[Webhook]:
        """Hooks of this owner, newest first; a bad token raises :class:`InvalidSpec`."""
        return self._db.read(lambda connection: hooks.page(connection, owner, page_size, page_token))

    def update(
        self,
        owner: str,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[EventType] | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given. Switching off ends what waits; switching on begins to count failures anew."""
        changes: dict[str, Any] = {}
        if url is not None:
            self.policy.target(url)
            changes["url"] = url
        if events is not None:
            changes["events"] = sorted({event.value for event in events})
        if enabled is not None:
            changes["enabled"] = enabled
        return self._db.write(lambda connection: hooks.update(connection, owner, webhook_id, changes))

    def delete(self, owner: str, webhook_id: str) -> None:
        """Remove a hook with its deliveries."""
        self._db.write(
            lambda connection: hooks.delete(connection, owner, webhook_id),
            landed=lambda connection, _: hooks.is_gone(connection, webhook_id),
        )

    def rotate_secret(
        self, owner: str, webhook_id: str, *, keep_previous: bool = True, idempotency_key: str | None = None
    ) -> NewSecret:
        """Give a hook a new secret and return it.

        With ``keep_previous`` messages are signed with the secret before it too, until the next rotation, so that a
        receiver can change over at any time. The same ``idempotency_key`` for the same hook rotates once: it returns
        that secret for a day, as long as no other has come after it. With anything else it raises :class:`Conflict`
        with the code ``idempotency_key_reused``.
        """
        secret = signing.new_secret()
        post = Post.of(owner, Makes.WEBHOOK_SECRET, idempotency_key, [webhook_id, keep_previous])
        return self._db.write(
            lambda connection: hooks.rotate(connection, owner, webhook_id, secret, keep_previous, post)
        )

    def deliveries(
        self,
        owner: str,
        webhook_id: str,
        *,
        state: DeliveryState | None = None,
        page_size: int = 50,
        page_token: str | None = None,
    ) -> Page[Delivery]:
        """Deliveries of a hook, newest first."""
        return self._db.read(
            lambda connection: hooks.deliveries_of(connection, owner, webhook_id, state, page_size, page_token)
        )

    def delivery(self, owner: str, webhook_id: str, delivery_id: str) -> Delivery:
        """One delivery of a hook."""
        return self._db.read(lambda connection: hooks.delivery(connection, owner, webhook_id, delivery_id))

    def redeliver(self, owner: str, webhook_id: str, delivery_id: str) -> Delivery:
        """Send a message again: a new delivery with the same message id; one that still waits is due at once instead.

        Raises :class:`Conflict` while it is being sent, and for a hook that is switched off.
        """
        new = new_id("dlv")
        return self._db.write(lambda connection: hooks.redeliver(connection, owner, webhook_id, delivery_id, new))

    def trial(self, owner: str, webhook_id: str) -> Delivery:
        """Send a ``webhook.test`` message; raises :class:`Conflict` for a hook that is switched off."""
        new = new_id("dlv")
        return self._db.write(lambda connection: hooks.trial(connection, owner, webhook_id, new))

    # --- what the sender does -------------------------------------------------------------------------------------

    def claim(self, room: int, *, lease_seconds: float) -> list[Due]:
        """Take at most ``room`` deliveries that are due, of any owner, at most one per hook.

        They are the caller's for ``lease_seconds``; after that they are due again, whatever became of the caller.
        """
        if room < 1 or not self._db.read(due.any_due):
            return []
        return self._db.write(
            lambda connection: due.claim(connection, room, lease_seconds, self._backoff, self._give_up_after),
            landed=lambda connection, taken: bool(taken) and due.holds(connection, taken),
        )

    def record(self, sent: Due, outcome: Outcome) -> Ending:
        """Write down what one try gave and return what becomes of the delivery."""
        return self._db.write(
            lambda connection: due.record(connection, sent, outcome, self._backoff, self._give_up_after)
        )

    def backlog(self) -> Backlog:
        """What is not delivered yet and by how much it is late: one cheap read, for metrics."""
        return self._db.read(due.backlog)

    def forget(self, seconds: float) -> int:
        """Remove deliveries that are over for longer than ``seconds``, a thousand at a time; returns how many."""
        removed = 0
        while some := self._db.write(lambda connection: due.forget(connection, seconds)):
            removed += some
        return removed
