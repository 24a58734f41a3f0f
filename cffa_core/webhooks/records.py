"""Values that the record hands out about web hooks: plain frozen dataclasses, no database objects."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any


class DeliveryState(StrEnum):
    """State of one delivery. ``failed`` was given up; the other two are still tried."""

    WAITING = "waiting"
    SENDING = "sending"
    DELIVERED = "delivered"
    FAILED = "failed"


@dataclass(frozen=True)
class Webhook:
    """An address that its owner wants told; ``events`` empty means everything. The secret is not part of it.

    ``failures`` deliveries in a row were given up; ``reason`` says why it was switched off, if the service did it.
    """

    id: str
    owner: str
    url: str
    events: tuple[str, ...]
    enabled: bool
    reason: str | None
    failures: int
    created_at: datetime


@dataclass(frozen=True)
class NewWebhook:
    """What making a hook gives. ``replayed``: the same idempotency key had made it before; then ``secret`` is None once
    it was replaced or is older than a day."""

    hook: Webhook
    secret: str | None
    replayed: bool = False


@dataclass(frozen=True)
class NewSecret:
    """What a rotation gives. ``replayed``: an earlier one with the same idempotency key had given it; then ``secret``
    is None once it was replaced or is older than a day."""

    secret: str | None
    replayed: bool = False


@dataclass(frozen=True)
class Delivery:
    """One message to one hook and what became of it. ``status`` and ``error`` are those of the last try.

    ``message_id`` is the ``webhook-id`` header: tries and redeliveries of one message share it.
    """

    id: str
    webhook_id: str
    message_id: str
    type: str
    state: DeliveryState
    tries: int
    due_at: datetime | None
    status: int | None
    error: str | None
    seconds: float | None
    created_at: datetime
    finished_at: datetime | None
    body: dict[str, Any]


@dataclass(frozen=True)
class Due:
    """A delivery that the caller sends now, until ``lease_ends`` (database time); try number ``tries`` of it."""

    delivery_id: str
    webhook_id: str
    message_id: str
    url: str
    secrets: tuple[str, ...]
    body: str
    tries: int
    lease_ends: float


@dataclass(frozen=True)
class Outcome:
    """What one try gave: an HTTP status, or an error where there was none; ``retry_after`` seconds if it was asked."""

    status: int | None
    error: str | None
    seconds: float
    retry_after: float | None = None

    @property
    def delivered(self) -> bool:
        """Whether the receiver took the message."""
        return self.status is not None and 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the receiver wants no more messages, ever (410)."""
        return self.status == 410


@dataclass(frozen=True)
class Backlog:
    """Deliveries that are not over, and by how many seconds the one that is due longest is late (0: none is)."""

    waiting: int
    sending: int
    late_seconds: float
