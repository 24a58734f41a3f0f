"""What the API says of web hooks and takes for them, as pydantic models; part of the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field

from cffa_core.webhooks.addresses import LONGEST_URL
from cffa_core.webhooks.messages import EventType
from cffa_core.webhooks.records import Delivery, DeliveryState, Webhook
from services.api.schemas import JOB, NOON, example

WEBHOOK = "wh_0123456789abcdefghij"
DELIVERY = "dlv_0123456789abcdefghij"
MESSAGE = "msg_0123456789abcdefghij"
SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

WEBHOOK_EXAMPLE: dict[str, Any] = {
    "id": WEBHOOK,
    "url": "https://example.org/cffa",
    "events": ["job.succeeded", "job.failed"],
    "enabled": True,
    "reason": None,
    "failures": 0,
    "created_at": NOON,
    "links": {"self": f"/v1/webhooks/{WEBHOOK}", "deliveries": f"/v1/webhooks/{WEBHOOK}/deliveries"},
}
DELIVERY_EXAMPLE: dict[str, Any] = {
    "id": DELIVERY,
    "message_id": MESSAGE,
    "type": "job.canceled",
    "state": "delivered",
    "tries": 1,
    "due_at": None,
    "status": 204,
    "error": None,
    "seconds": 0.12,
    "created_at": NOON,
    "finished_at": NOON,
    "links": {"self": f"/v1/webhooks/{WEBHOOK}/deliveries/{DELIVERY}"},
}
MESSAGE_EXAMPLE: dict[str, Any] = {
    "type": "job.canceled",
    "timestamp": NOON,
    "data": {"id": JOB, "kind": "training", "state": "canceled", "links": {"self": f"/v1/jobs/{JOB}"}},
}

Url = Annotated[
    str,
    Field(
        min_length=1,
        max_length=LONGEST_URL,
        description="https, a public host, no user and no fragment; whoever runs the service may allow more.",
    ),
]
Events = Annotated[list[EventType], Field(max_length=50, description="What the hook is told; empty: everything.")]


class WebhookRequest(BaseModel):
    """A web hook as posted."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"url": "https://example.org/cffa", "events": ["job.succeeded", "job.failed"]}]
        },
    )
    url: Url
    events: Events = []


class WebhookChange(BaseModel):
    """What of a web hook is to change; what is left out (or null) stays."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"enabled": True}]})
    url: Url | None = None
    events: Events | None = None
    enabled: bool | None = None


class SecretRequest(BaseModel):
    """How a secret is replaced. ``keep_previous``: messages are signed with both until the next rotation."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"keep_previous": True}]})
    keep_previous: bool = True


class WebhookView(BaseModel):
    """A web hook. ``reason`` says why the service switched it off; ``failures`` in a row were given up."""

    model_config = example(WEBHOOK_EXAMPLE)
    id: str
    url: str
    events: list[str]
    enabled: bool
    reason: str | None
    failures: int
    created_at: datetime
    links: dict[str, str]

    @classmethod
    def of(cls, hook: Webhook, **more: Any) -> Self:
        here = f"/v1/webhooks/{hook.id}"
        return cls(
            id=hook.id,
            url=hook.url,
            events=list(hook.events),
            enabled=hook.enabled,
            reason=hook.reason,
            failures=hook.failures,
            created_at=hook.created_at,
            links={"self": here, "deliveries": f"{here}/deliveries"},
            **more,
        )


class WebhookWithSecret(WebhookView):
    """A new web hook with its secret, which is shown now and never again, but to a repetition of the same post."""

    model_config = example({**WEBHOOK_EXAMPLE, "secret": SECRET})
    secret: str | None = Field(
        description="Null in a repetition by Idempotency-Key that comes more than a day later, or after a rotation."
    )


class SecretView(BaseModel):
    """A new secret, which is shown now and never again, but to a repetition of the same post."""

    model_config = example({"secret": SECRET})
    secret: str | None = Field(
        description="Null in a repetition by Idempotency-Key that comes more than a day later, or after another one."
    )


class WebhookList(BaseModel):
    """One page of web hooks, newest first."""

    items: list[WebhookView]
    next_page_token: str | None


class DeliveryView(BaseModel):
    """One message to one web hook. ``status`` and ``error`` are of the last try; ``due_at`` is when it is tried next,
    or, while it is being sent, when that is taken up again. ``message_id`` is the header ``webhook-id``."""

    model_config = example(DELIVERY_EXAMPLE)
    id: str
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
    links: dict[str, str]

    @classmethod
    def of(cls, delivery: Delivery, **more: Any) -> Self:
        return cls(
            id=delivery.id,
            message_id=delivery.message_id,
            type=delivery.type,
            state=delivery.state,
            tries=delivery.tries,
            due_at=delivery.due_at,
            status=delivery.status,
            error=delivery.error,
            seconds=delivery.seconds,
            created_at=delivery.created_at,
            finished_at=delivery.finished_at,
            links={"self": f"/v1/webhooks/{delivery.webhook_id}/deliveries/{delivery.id}"},
            **more,
        )


class DeliveryDetail(DeliveryView):
    """A delivery with the message that was, or will be, sent."""

    model_config = example({**DELIVERY_EXAMPLE, "body": MESSAGE_EXAMPLE})
    body: dict[str, Any]


class DeliveryList(BaseModel):
    """One page of deliveries, newest first."""

    items: list[DeliveryView]
    next_page_token: str | None
