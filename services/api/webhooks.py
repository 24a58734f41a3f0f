"""Web hooks: addresses that are told what happens to jobs and data sets, and what was sent to them.

What is sent, and when again, the record decides (``cffa_core.webhooks``); the sending is in ``webhook_sender``.
"""

from __future__ import annotations

from fastapi import APIRouter, Response

from cffa_core.webhooks.records import DeliveryState
from services.api.access import DeliveryId, IdempotencyKey, Owner, TheBackend, WebhookId
from services.api.paging import PageSize, PageToken
from services.api.problems import documented
from services.api.webhook_schemas import (
    DeliveryDetail,
    DeliveryList,
    DeliveryView,
    SecretRequest,
    SecretView,
    WebhookChange,
    WebhookList,
    WebhookRequest,
    WebhookView,
    WebhookWithSecret,
)

router = APIRouter(tags=["webhooks"])


@router.post(
    "/v1/webhooks",
    status_code=201,
    operation_id="createWebhook",
    summary="Make a web hook",
    responses=documented(400, 403, 409, 413, 422, 503),
)
def create_webhook(
    request: WebhookRequest,
    response: Response,
    backend: TheBackend,
    owner: Owner,
    idempotency_key: IdempotencyKey = None,
) -> WebhookWithSecret:
    """Tell an address about your jobs and data sets. The answer shows the secret that signs the messages, once; only a
    repetition with the same Idempotency-Key shows it again, for a day and until it is replaced (then it is null)."""
    made = backend.hooks.create(owner, request.url, request.events, idempotency_key=idempotency_key)
    response.headers["Location"] = f"/v1/webhooks/{made.hook.id}"
    if made.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return WebhookWithSecret.of(made.hook, secret=made.secret)


@router.get(
    "/v1/webhooks",
    operation_id="listWebhooks",
    summary="List web hooks, newest first",
    responses=documented(422, 503),
)
def list_webhooks(
    backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> WebhookList:
    """One page of web hooks, without their secrets."""
    page = backend.hooks.page(owner, page_size, page_token)
    return WebhookList(items=[WebhookView.of(hook) for hook in page.items], next_page_token=page.next_token)


@router.get(
    "/v1/webhooks/{webhook_id}",
    operation_id="getWebhook",
    summary="Get a web hook",
    responses=documented(404, 503),
)
def get_webhook(webhook_id: WebhookId, backend: TheBackend, owner: Owner) -> WebhookView:
    """One web hook; `reason` says why it was switched off, if the service did that."""
    return WebhookView.of(backend.hooks.get(owner, webhook_id))


@router.patch(
    "/v1/webhooks/{webhook_id}",
    operation_id="updateWebhook",
    summary="Change a web hook",
    responses=documented(400, 403, 404, 413, 422, 503),
)
def update_webhook(webhook_id: WebhookId, request: WebhookChange, backend: TheBackend, owner: Owner) -> WebhookView:
    """Another URL, other events, on or off. Switching off ends what waits (it can be redelivered later)."""
    changed = backend.hooks.update(owner, webhook_id, url=request.url, events=request.events, enabled=request.enabled)
    return WebhookView.of(changed)


@router.delete(
    "/v1/webhooks/{webhook_id}",
    status_code=204,
    operation_id="deleteWebhook",
    summary="Remove a web hook",
    responses=documented(403, 404, 503),
)
def delete_webhook(webhook_id: WebhookId, backend: TheBackend, owner: Owner) -> Response:
    """Remove a web hook and the list of its deliveries."""
    backend.hooks.delete(owner, webhook_id)
    return Response(status_code=204)


@router.post(
    "/v1/webhooks/{webhook_id}:rotate-secret",
    operation_id="rotateWebhookSecret",
    summary="Replace a web hook's secret",
    responses=documented(400, 403, 404, 413, 422, 503),
)
def rotate_secret(
    webhook_id: WebhookId,
    response: Response,
    backend: TheBackend,
    owner: Owner,
    request: SecretRequest | None = None,
    idempotency_key: IdempotencyKey = None,
) -> SecretView:
    """A new secret, shown once. Messages are signed with the previous one too, unless you say otherwise. A repetition
    with the same Idempotency-Key makes none, and shows it again, for a day and until it is replaced (then it is
    null)."""
    keep = request is None or request.keep_previous
    new = backend.hooks.rotate_secret(owner, webhook_id, keep_previous=keep, idempotency_key=idempotency_key)
    if new.replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return SecretView(secret=new.secret)


@router.post(
    "/v1/webhooks/{webhook_id}:test",
    status_code=202,
    operation_id="testWebhook",
    summary="Send a test message",
    responses=documented(403, 404, 409, 503),
)
def test_webhook(webhook_id: WebhookId, backend: TheBackend, owner: Owner) -> DeliveryView:
    """Send `webhook.test` now; look at the delivery to see whether it arrived. 409 if the hook is switched off."""
    return DeliveryView.of(backend.hooks.trial(owner, webhook_id))


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries",
    operation_id="listDeliveries",
    summary="List what was sent to a web hook, newest first",
    responses=documented(404, 422, 503),
)
def list_deliveries(
    webhook_id: WebhookId,
    backend: TheBackend,
    owner: Owner,
    state: DeliveryState | None = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> DeliveryList:
    """One page of deliveries; `state` filters. Those that are over are listed for some weeks."""
    page = backend.hooks.deliveries(owner, webhook_id, state=state, page_size=page_size, page_token=page_token)
    return DeliveryList(items=[DeliveryView.of(item) for item in page.items], next_page_token=page.next_token)


@router.get(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}",
    operation_id="getDelivery",
    summary="Get a delivery with its message",
    responses=documented(404, 503),
)
def get_delivery(webhook_id: WebhookId, delivery_id: DeliveryId, backend: TheBackend, owner: Owner) -> DeliveryDetail:
    """What was sent, how often, and what came of the last try."""
    delivery = backend.hooks.delivery(owner, webhook_id, delivery_id)
    return DeliveryDetail.of(delivery, body=delivery.body)


@router.post(
    "/v1/webhooks/{webhook_id}/deliveries/{delivery_id}:redeliver",
    status_code=202,
    operation_id="redeliver",
    summary="Send a message again",
    responses=documented(403, 404, 409, 503),
)
def redeliver(webhook_id: WebhookId, delivery_id: DeliveryId, backend: TheBackend, owner: Owner) -> DeliveryView:
    """A new delivery of the same message, with the same `webhook-id`; one that still waits is tried at once instead.
    409 while it is being sent, and if the hook is switched off."""
    return DeliveryView.of(backend.hooks.redeliver(owner, webhook_id, delivery_id))
