"""Signatures, judged by the reference library of the standard and by its published example."""

from __future__ import annotations

import base64
import time

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from cffa_core.webhooks.signing import TOLERANCE_SECONDS, BadSignature, headers, new_secret, verify

BODY = '{"type":"job.succeeded","data":{"größe":1}}'.encode()


def test_the_example_that_the_standard_gives() -> None:
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    signed = headers([secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signed["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secrets", [1, 2])
def test_the_library_accepts_what_is_signed_with_any_of_the_secrets(secrets: int) -> None:
    made = [new_secret() for _ in range(secrets)]
    signed = headers(made, "msg_1", int(time.time()), BODY)
    for secret in made:
        assert Webhook(secret).verify(BODY, signed)["type"] == "job.succeeded"
        verify(secret, signed, BODY, now=time.time())
    with pytest.raises(WebhookVerificationError):
        Webhook(new_secret()).verify(BODY, signed)


def test_what_the_library_signs_is_accepted() -> None:
    secret, now = new_secret(), int(time.time())
    signed = headers([secret], "msg_1", now, BODY)
    from datetime import UTC, datetime

    assert signed["webhook-signature"] == Webhook(secret).sign("msg_1", datetime.fromtimestamp(now, UTC), BODY.decode())


@pytest.mark.parametrize(
    "changed",
    [
        {"webhook-id": "msg_2"},
        {"webhook-id": ""},
        {"webhook-timestamp": "1000000001"},
        {"webhook-timestamp": "x"},
        {"webhook-timestamp": ""},
        {"webhook-signature": ""},
        {"webhook-signature": "v1,"},
        {"webhook-signature": "v1a,ÿ"},
    ],
)
def test_a_changed_message_is_refused(changed: dict[str, str]) -> None:
    secret = new_secret()
    signed = headers([secret], "msg_1", 1_000_000_000, BODY)
    verify(secret, signed, BODY, now=1_000_000_000)
    with pytest.raises(BadSignature):
        verify(secret, signed | changed, BODY, now=1_000_000_000)
    with pytest.raises(BadSignature):
        verify(secret, signed, BODY + b" ", now=1_000_000_000)


def test_an_old_message_is_refused() -> None:
    secret = new_secret()
    signed = headers([secret], "msg_1", 1_000_000_000, BODY)
    for away in (-1, 1):
        verify(secret, signed, BODY, now=1_000_000_000 + away * TOLERANCE_SECONDS)
        with pytest.raises(BadSignature, match="clock"):
            verify(secret, signed, BODY, now=1_000_000_000 + away * (TOLERANCE_SECONDS + 1))


def test_secrets_are_long_and_differ() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert {len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) for secret in made} == {32}


@pytest.mark.parametrize("secret", ["whsec_", "whsec_AAAA", "whsec_" + "A" * 400, "whsec_not base64!"])
def test_a_bad_secret_is_named(secret: str) -> None:
    with pytest.raises(BadSignature, match="secret"):
        headers([secret], "msg_1", 1, BODY)
