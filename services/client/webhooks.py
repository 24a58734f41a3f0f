"""Web hooks of the service: the calls of ``CffaClient.webhooks`` and what they return. Nothing here prints.

Messages themselves are checked with ``cffa_core.webhooks.signing.verify``, or any library of Standard Webhooks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, TypeVar

from cffa_core.errors import Conflict
from cffa_core.webhooks.messages import EventType
from cffa_core.webhooks.records import DeliveryState
from services.client.calls import new_key
from services.client.problems import document_of
from services.client.resources import Page, Resource
from services.client.transport import Transport

R = TypeVar("R", bound=Resource)
LOOK_SECONDS = 0.5
OVER = (DeliveryState.DELIVERED.value, DeliveryState.FAILED.value)


class Webhook(Resource):
    """A web hook; ``secret`` is there only in the answer that made it. ``reason``: why the service switched it off."""

    id: str
    url: str
    events: list[str]
    enabled: bool
    reason: str | None = None
    failures: int = 0
    created_at: datetime
    secret: str | None = None


class Delivery(Resource):
    """One message to a web hook: waiting, sending, delivered or failed; ``status``, ``error`` are of the last try."""

    id: str
    message_id: str
    type: str
    state: str
    tries: int
    due_at: datetime | None = None
    status: int | None = None
    error: str | None = None
    seconds: float | None = None
    created_at: datetime
    finished_at: datetime | None = None
    body: dict[str, Any] | None = None


class WebhookCalls:
    """Calls on web hooks; errors as in :class:`services.client.client.CffaClient`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._http = transport.http

    def create(self, url: str, events: Sequence[EventType | str] = ()) -> Webhook:
        """Make a web hook for these event types (none: all). Its ``secret`` is shown here and never again.

        A post that got no answer is repeated under one key, and makes one hook. Raises ``InvalidSpec`` for an address
        that the service does not send to, ``Conflict`` if there are too many.
        """
        body = {"url": url, "events": [str(event) for event in events]}
        headers = _once()
        answer = self._transport.sent(
            lambda: self._http.post("/v1/webhooks", json=body, headers=headers), repeatable=True
        )
        return Webhook.model_validate_json(answer.content)

    def all(self) -> Iterator[Webhook]:
        """All web hooks, newest first."""
        return self._pages("/v1/webhooks", Webhook, {})

    def get(self, webhook_id: str) -> Webhook:
        """One web hook."""
        return self._get(f"/v1/webhooks/{webhook_id}", Webhook, {})

    def update(
        self,
        webhook_id: str,
        *,
        url: str | None = None,
        events: Sequence[EventType | str] | None = None,
        enabled: bool | None = None,
    ) -> Webhook:
        """Change what is given; switching on again begins to count failures anew."""
        given = {"url": url, "events": None if events is None else [str(event) for event in events], "enabled": enabled}
        body = {name: value for name, value in given.items() if value is not None}
        answer = self._transport.sent(
            lambda: self._http.patch(f"/v1/webhooks/{webhook_id}", json=body), repeatable=True
        )
        return Webhook.model_validate_json(answer.content)

    def delete(self, webhook_id: str) -> None:
        """Remove a web hook with the list of its deliveries."""
        self._transport.sent(lambda: self._http.delete(f"/v1/webhooks/{webhook_id}"), repeatable=False)

    def rotate_secret(self, webhook_id: str, *, keep_previous: bool = True) -> str:
        """A new secret, shown here and never again; messages are signed with the previous one too, if it is kept.

        A post that got no answer is repeated under one key, and rotates once. Raises ``Conflict`` if another rotation
        came in between.
        """
        path, body, headers = f"/v1/webhooks/{webhook_id}:rotate-secret", {"keep_previous": keep_previous}, _once()
        answer = self._transport.sent(lambda: self._http.post(path, json=body, headers=headers), repeatable=True)
        if (secret := document_of(answer)["secret"]) is None:
            raise Conflict(f"the secret of {webhook_id} was replaced again in between; rotate once more")
        return str(secret)

    def test(self, webhook_id: str) -> Delivery:
        """Have a test message sent; :meth:`wait` tells whether it arrived."""
        return self._post(f"/v1/webhooks/{webhook_id}:test", Delivery)

    def deliveries(self, webhook_id: str, *, state: str | None = None) -> Iterator[Delivery]:
        """What was sent to a web hook, newest first, without the messages themselves."""
        query = {} if state is None else {"state": state}
        return self._pages(f"/v1/webhooks/{webhook_id}/deliveries", Delivery, query)

    def delivery(self, webhook_id: str, delivery_id: str) -> Delivery:
        """One delivery with its message as ``body``."""
        return self._get(f"/v1/webhooks/{webhook_id}/deliveries/{delivery_id}", Delivery, {})

    def redeliver(self, webhook_id: str, delivery_id: str) -> Delivery:
        """Have a message sent again under its old ``webhook-id``; one that still waits is tried at once."""
        return self._post(f"/v1/webhooks/{webhook_id}/deliveries/{delivery_id}:redeliver", Delivery)

    def wait(self, webhook_id: str, delivery_id: str, *, timeout: float = 30.0) -> Delivery:
        """The delivery once it was tried, whatever came of it, or as it is after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while True:
            now = self.delivery(webhook_id, delivery_id)
            tried = now.state in OVER or (now.state == DeliveryState.WAITING.value and now.tries > 0)
            if tried or time.monotonic() > end:
                return now
            time.sleep(LOOK_SECONDS)

    def _post(self, path: str, kind: type[R]) -> R:
        answer = self._transport.sent(lambda: self._http.post(path), repeatable=False)
        return kind.model_validate_json(answer.content)

    def _get(self, path: str, kind: type[R], query: dict[str, str]) -> R:
        answer = self._transport.sent(lambda: self._http.get(path, params=query), repeatable=True)
        return kind.model_validate_json(answer.content)

    def _pages(self, path: str, kind: type[R], query: dict[str, str]) -> Iterator[R]:
        token: str | None = None
        while True:
            page = self._get(path, Page[Any], query if token is None else {**query, "page_token": token})
            yield from (kind.model_validate(item) for item in page.items)
            token = page.next_page_token
            if token is None:
                return


def _once() -> dict[str, str]:
    """The header under which a post is repeated; one for each call."""
    return {"Idempotency-Key": new_key()}
