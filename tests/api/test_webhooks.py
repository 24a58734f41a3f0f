"""Web hooks through the API: made, told, tested, changed, redelivered, removed; what is refused; metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from standardwebhooks import Webhook

from cffa_core.errors import InvalidSettings
from cffa_core.settings import Settings
from services.api import webhook_schemas
from services.api.app import create_app
from tests.api.conftest import fresh_home
from tests.api.driving import URL, problem
from tests.webhook_receivers import LOOPBACK, Receiver, receiver

NOWHERE = "wh_00000000000000000000"


@pytest.fixture
def settings(tmp_path: Path, migrated: Path) -> Settings:
    return fresh_home(tmp_path, migrated).model_copy(update={**LOOPBACK, "webhook_first_pause_seconds": 0.05})


@pytest.fixture
def there() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def make(client: TestClient, url: str, events: list[str] | None = None) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": url, "events": events or []})
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/webhooks/{made['id']}"
    return made


def delivered(client: TestClient, webhook_id: str, number: int) -> list[dict[str, Any]]:
    """The deliveries of a hook, oldest first, once so many are delivered."""
    end = time.monotonic() + 60
    while True:
        found = client.get(f"/v1/webhooks/{webhook_id}/deliveries?state=delivered").json()["items"]
        if len(found) >= number:
            return list(reversed(found))
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_is_told_of_from_its_change_to_the_receiver(client: TestClient, dataset_id: str, there: Receiver) -> None:
    hook = make(client, there.url(), ["job.canceled"])
    job = client.post("/v1/training-jobs", json={"dataset_id": dataset_id, "steps": 2}).json()
    client.post(f"/v1/jobs/{job['id']}:cancel")
    (message,) = there.wait(1)
    said = Webhook(hook["secret"]).verify(message.body, message.headers)
    assert said["type"] == "job.canceled"
    assert said["data"]["links"]["self"] == f"/v1/jobs/{job['id']}"
    (delivery,) = delivered(client, hook["id"], 1)
    assert (delivery["type"], delivery["status"], delivery["tries"]) == ("job.canceled", 204, 1)
    assert delivery["message_id"] == message.id
    detail = client.get(delivery["links"]["self"]).json()
    assert detail["body"] == said


def test_tries_again_and_redelivery(client: TestClient, there: Receiver) -> None:
    hook = make(client, there.url())
    there.answers = [(500, {}), (302, {"Location": "http://169.254.169.254/"})]
    first = client.post(f"/v1/webhooks/{hook['id']}:test")
    assert first.status_code == 202 and first.json()["state"] == "waiting"
    there.wait(3)
    (delivery,) = delivered(client, hook["id"], 1)
    assert (delivery["id"], delivery["tries"]) == (first.json()["id"], 3)
    again = client.post(f"/v1/webhooks/{hook['id']}/deliveries/{delivery['id']}:redeliver")
    assert again.status_code == 202 and again.json()["id"] != delivery["id"]
    assert len({message.id for message in there.wait(4)}) == 1
    assert len(delivered(client, hook["id"], 2)) == 2


def test_gone_switches_off_and_the_owner_on_again(client: TestClient, there: Receiver) -> None:
    hook = make(client, there.url())
    there.answers = [(410, {})]
    client.post(f"/v1/webhooks/{hook['id']}:test")
    end = time.monotonic() + 60
    while (now := client.get(f"/v1/webhooks/{hook['id']}").json())["enabled"]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert "410" in now["reason"]
    problem(client.post(f"/v1/webhooks/{hook['id']}:test"), 409, "conflict")
    (failed,) = client.get(f"/v1/webhooks/{hook['id']}/deliveries?state=failed").json()["items"]
    problem(client.post(failed["links"]["self"] + ":redeliver"), 409, "conflict")
    on = client.patch(f"/v1/webhooks/{hook['id']}", json={"enabled": True}).json()
    assert (on["enabled"], on["reason"]) == (True, None)
    client.post(failed["links"]["self"] + ":redeliver")
    delivered(client, hook["id"], 1)


def test_one_key_makes_one_hook_and_tells_its_secret_again(client: TestClient, there: Receiver) -> None:
    body, headers = {"url": there.url(), "events": ["job.failed"]}, {"Idempotency-Key": "k1"}
    first, again = (client.post("/v1/webhooks", json=body, headers=headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.json() == again.json() and first.headers["location"] == again.headers["location"]
    replayed = [answer.headers.get("idempotency-replayed") for answer in (first, again)]
    assert replayed == [None, "true"]
    other = client.post("/v1/webhooks", json={**body, "events": []}, headers=headers)
    problem(other, 422, "idempotency_key_reused")
    assert len(client.get("/v1/webhooks").json()["items"]) == 1
    rotated = client.post(f"/v1/webhooks/{first.json()['id']}:rotate-secret").json()["secret"]
    late = client.post("/v1/webhooks", json=body, headers=headers)
    assert late.status_code == 201 and late.json() == {**first.json(), "secret": None} and rotated not in late.text


def test_secrets_are_shown_once_and_change_over(client: TestClient, there: Receiver) -> None:
    hook = make(client, there.url())
    old = hook["secret"]
    rotated = client.post(f"/v1/webhooks/{hook['id']}:rotate-secret")
    new = rotated.json()["secret"]
    client.post(f"/v1/webhooks/{hook['id']}:test")
    (message,) = there.wait(1)
    for secret in (old, new):
        Webhook(secret).verify(message.body, message.headers)
    last = client.post(f"/v1/webhooks/{hook['id']}:rotate-secret", json={"keep_previous": False}).json()["secret"]
    delivered(client, hook["id"], 1)
    client.post(f"/v1/webhooks/{hook['id']}:test")
    message = there.wait(2)[1]
    Webhook(last).verify(message.body, message.headers)
    assert message.headers["webhook-signature"].count("v1,") == 1
    shown = client.get("/v1/webhooks").text + client.get(f"/v1/webhooks/{hook['id']}").text
    assert not [secret for secret in (old, new, last) if secret in shown]


def test_one_key_rotates_once(client: TestClient, there: Receiver) -> None:
    url, headers = f"/v1/webhooks/{make(client, there.url())['id']}:rotate-secret", {"Idempotency-Key": "k"}
    first, again = (client.post(url, headers=headers) for _ in range(2))
    assert first.json() == again.json() and first.json()["secret"].startswith("whsec_")
    assert [answer.headers.get("idempotency-replayed") for answer in (first, again)] == [None, "true"]
    problem(client.post(url, json={"keep_previous": False}, headers=headers), 422, "idempotency_key_reused")
    client.post(url)
    late = client.post(url, headers=headers)
    assert (late.status_code, late.json()) == (200, {"secret": None})


def test_listing_changing_removing(client: TestClient) -> None:
    made = [make(client, f"https://example.org/{number}")["id"] for number in range(3)]
    page = client.get("/v1/webhooks?page_size=2").json()
    rest = client.get(f"/v1/webhooks?page_size=2&page_token={page['next_page_token']}").json()
    assert [item["id"] for item in page["items"] + rest["items"]] == made[::-1]
    changed = client.patch(
        f"/v1/webhooks/{made[0]}", json={"url": "https://example.org/other", "events": ["job.failed", "job.failed"]}
    ).json()
    assert (changed["url"], changed["events"]) == ("https://example.org/other", ["job.failed"])
    assert client.delete(f"/v1/webhooks/{made[0]}").status_code == 204
    problem(client.get(f"/v1/webhooks/{made[0]}"), 404, "not_found")
    problem(client.delete(f"/v1/webhooks/{made[0]}"), 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("get", f"/v1/webhooks/{NOWHERE}"),
        ("patch", f"/v1/webhooks/{NOWHERE}"),
        ("delete", f"/v1/webhooks/{NOWHERE}"),
        ("post", f"/v1/webhooks/{NOWHERE}:rotate-secret"),
        ("post", f"/v1/webhooks/{NOWHERE}:test"),
        ("get", f"/v1/webhooks/{NOWHERE}/deliveries"),
        ("get", f"/v1/webhooks/{NOWHERE}/deliveries/dlv_00000000000000000000"),
        ("post", f"/v1/webhooks/{NOWHERE}/deliveries/dlv_00000000000000000000:redeliver"),
        ("get", "/v1/webhooks/x"),
    ],
)
def test_what_is_not_there(plain_client: TestClient, method: str, path: str) -> None:
    problem(plain_client.request(method, path, json={} if method == "patch" else None), 404, "not_found")


@pytest.mark.parametrize(
    "url",
    [
        *("http://example.org/", "https://127.0.0.1/", "https://localhost:22/", "https://0x7f.1/", "https://[::1]/"),
        *("https://169.254.169.254/latest", "https://user@example.org/", "https://example.org/#x", "", "x" * 2001),
    ],
)
def test_addresses_that_are_refused_when_posted(plain_client: TestClient, url: str) -> None:
    """With the settings that everybody has."""
    body = problem(plain_client.post("/v1/webhooks", json={"url": url}), 422, "invalid_spec")
    assert [item["pointer"] for item in body["errors"]] == ["/url"]
    assert plain_client.get("/v1/webhooks").json()["items"] == []


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, "/url"),
        ({"url": "https://example.org/", "events": ["job.danced"]}, "/events/0"),
        ({"url": "https://example.org/", "events": ["webhook.test"]}, "/events/0"),
        ({"url": "https://example.org/", "secret": "whsec_mine"}, "/secret"),
    ],
)
def test_bodies_that_are_refused(plain_client: TestClient, body: dict[str, Any], pointer: str) -> None:
    answer = problem(plain_client.post("/v1/webhooks", json=body), 422, "invalid_spec")
    assert [item["pointer"] for item in answer["errors"]] == [pointer]


def test_more_than_the_limit(client: TestClient) -> None:
    for number in range(20):
        make(client, f"https://example.org/{number}")
    problem(client.post("/v1/webhooks", json={"url": "https://example.org/"}), 409, "conflict")


def test_metrics_say_what_waits_and_what_came(client: TestClient, app: FastAPI, there: Receiver) -> None:
    hook = make(client, there.url())
    there.answers = [(500, {})]
    client.post(f"/v1/webhooks/{hook['id']}:test")
    delivered(client, hook["id"], 1)
    time.sleep(1.1)  # the page is made once a second
    page = client.get("/metrics").text
    assert 'cffa_webhook_tries_total{ending="again"} 1.0' in page
    assert 'cffa_webhook_tries_total{ending="delivered"} 1.0' in page
    assert 'cffa_webhook_deliveries{state="waiting"} 0.0' in page
    assert "cffa_webhook_late_seconds 0.0" in page


def test_settings_that_cannot_work_are_refused_at_start(settings: Settings) -> None:
    for wrong in ({"webhook_ports": "https"}, {"webhook_allow_networks": "intranet"}):
        with pytest.raises(InvalidSettings, match="CFFA_WEBHOOK_PORTS"):
            create_app(settings.model_copy(update=wrong))


def test_examples_are_valid() -> None:
    for name in ("WebhookRequest", "WebhookChange", "SecretRequest", "WebhookView", "WebhookWithSecret", "SecretView",
                 "DeliveryView", "DeliveryDetail"):  # fmt: skip
        model = getattr(webhook_schemas, name)
        (shown,) = model.model_config["json_schema_extra"]["examples"]
        model.model_validate(shown)


def test_the_sender_ends_with_the_application(settings: Settings, there: Receiver) -> None:
    with TestClient(create_app(settings), base_url=URL) as first:
        hook = make(first, there.url())
    began = time.monotonic()
    with TestClient(create_app(settings), base_url=URL) as second:
        second.post(f"/v1/webhooks/{hook['id']}:test")
        there.wait(1)
    assert time.monotonic() - began < 30
