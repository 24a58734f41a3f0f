"""The sender against real receivers: where it connects, what it sends, how long it stays, and who sends what once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from cffa_core.errors import InvalidSettings
from cffa_core.jobs.store import JobStore
from cffa_core.webhooks.addresses import Lookup
from cffa_core.webhooks.records import DeliveryState, Due, Outcome
from cffa_core.webhooks.signing import new_secret
from cffa_core.webhooks.store import Webhooks
from services.api.webhook_sender import Sender, require_sensible
from tests.record_cases import OWNER, sqlite_store
from tests.webhook_receivers import NAME, Receiver, certificate, loopback_settings, raw_receiver, receiver

ROOT = Path(__file__).resolve().parents[2]


def one(address: str) -> Lookup:
    return lambda host, port: [address]


@pytest.fixture
def sent(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Send one message to a URL and return what came of it."""
    store = sqlite_store(tmp_path)

    def send(url: str, lookup: Lookup | None = None, secrets: tuple[str, ...] = (), **settings: object) -> Outcome:
        made = loopback_settings(tmp_path, **settings)
        hooks = Webhooks.of(store.database, made)
        sender = Sender(hooks, made, **({} if lookup is None else {"lookup": lookup}))  # type: ignore[arg-type]
        secrets = secrets or (new_secret(),)
        due = Due("dlv_1", "wh_1", "msg_1", url, secrets, '{"type":"webhook.test"}', 1, 0.0)
        return asyncio.run(sender.send(due))

    yield send
    store.close()


@pytest.fixture
def there() -> Iterator[Receiver]:
    with receiver() as running:
        yield running


def test_a_message_as_the_standard_wants_it(sent: Callable[..., Outcome], there: Receiver) -> None:
    secrets = (new_secret(), new_secret())
    outcome = sent(there.url(NAME, path="/a/b?c=d"), one("127.0.0.1"), secrets)
    assert (outcome.status, outcome.error, outcome.delivered) == (204, None, True)
    (message,) = there.messages
    assert message.path == "/a/b?c=d"
    assert message.headers["host"] == f"{NAME}:{there.port}"
    assert message.headers["content-type"] == "application/json"
    assert message.id == "msg_1"
    for secret in secrets:
        assert Webhook(secret).verify(message.body, message.headers) == {"type": "webhook.test"}
    assert not {"cookie", "authorization"} & set(message.headers)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]"])
def test_loopback_is_refused_however_it_is_written(sent: Callable[..., Outcome], there: Receiver, host: str) -> None:
    outcome = sent(there.url(host), webhook_allow_networks="")
    assert outcome.status is None and outcome.error is not None
    assert there.messages == []


def test_one_private_address_among_public_ones_is_enough_to_refuse(
    sent: Callable[..., Outcome], there: Receiver
) -> None:
    outcome = sent(there.url(NAME), lambda host, port: ["127.0.0.1", "10.0.0.1"])
    assert outcome.error == "the host has no public address"
    assert there.messages == []


def test_a_name_that_changes_its_address_is_looked_up_once(sent: Callable[..., Outcome]) -> None:
    """DNS rebinding: the first answer may be connected to, the second may not; only the first is ever asked for."""
    asked: list[str] = []
    heard: list[str] = []
    looking = True

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if looking and event.startswith("socket.getaddrinfo"):
            heard.append(str(arguments[0]))

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.2"] if len(asked) == 1 else ["127.0.0.1"]

    sys.addaudithook(audit)
    with receiver("127.0.0.2") as checked, receiver("127.0.0.1", checked.port) as forbidden:
        for _ in range(2):
            asked.clear()
            outcome = sent(checked.url(NAME), rebinding, webhook_allow_networks="127.0.0.2/32")
            assert outcome.status == 204
            assert asked == [NAME]
        looking = False
        assert len(checked.messages) == 2
        assert {message.headers["host"] for message in checked.messages} == {f"{NAME}:{checked.port}"}
        assert forbidden.messages == []
    assert not [host for host in heard if NAME in host]  # nor does anybody below look it up again


def test_the_next_address_is_tried_where_nobody_listens(sent: Callable[..., Outcome], there: Receiver) -> None:
    outcome = sent(there.url(NAME), lambda host, port: ["127.0.0.9", "127.0.0.1"])
    assert outcome.status == 204


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(sent: Callable[..., Outcome], there: Receiver, status: int) -> None:
    with receiver() as other:
        for location in (other.url(), "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd"):
            there.answers = [(status, {"Location": location})]
            outcome = sent(there.url())
            assert (outcome.status, outcome.delivered) == (status, False)
        assert other.messages == []


def test_proxies_of_the_environment_are_not_used(
    sent: Callable[..., Outcome], there: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert sent(there.url()).status == 204


IN_TEN_MINUTES = "in ten minutes, as a date"


@pytest.mark.parametrize(
    ("status", "header", "seconds"),
    [
        (503, "120", (120, 120)),
        (429, IN_TEN_MINUTES, (500, 601)),
        (503, "soon", None),
        (503, "-5", None),
        (503, "", None),
        (503, "1" * 30, None),
        (410, "", None),
    ],
)
def test_what_a_receiver_asks_for(
    sent: Callable[..., Outcome], there: Receiver, status: int, header: str, seconds: tuple[int, int] | None
) -> None:
    if header == IN_TEN_MINUTES:  # counted from now, not from when the tests were collected
        header = format_datetime(datetime.now(UTC) + timedelta(seconds=600), usegmt=True)
    there.answers = [(status, {"Retry-After": header})]
    outcome = sent(there.url())
    assert (outcome.status, outcome.gone) == (status, status == 410)
    if seconds is None:
        assert outcome.retry_after is None
    else:
        assert outcome.retry_after is not None and seconds[0] <= outcome.retry_after <= seconds[1]


def drip(first: bytes) -> Callable[[socket.socket], None]:
    """Say ``first`` and then one byte at a time, for ever."""

    def speak(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(300):
            time.sleep(0.05)
            connection.sendall(b"x")

    return speak


def test_a_receiver_that_drips_headers_is_left_in_time(sent: Callable[..., Outcome]) -> None:
    with raw_receiver(drip(b"HTTP/1.1 200 OK\r\nX-Slow: ")) as port:
        outcome = sent(f"http://127.0.0.1:{port}/", webhook_timeout_seconds=0.6)
    assert (outcome.status, outcome.error) == (None, "no answer within 0.6 s")
    assert 0.5 < outcome.seconds < 3


def test_a_receiver_that_drips_its_body_has_answered(sent: Callable[..., Outcome]) -> None:
    with raw_receiver(drip(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")) as port:
        outcome = sent(f"http://127.0.0.1:{port}/", webhook_timeout_seconds=0.6)
    assert (outcome.status, outcome.error) == (200, None)
    assert outcome.seconds < 3


def test_a_receiver_that_says_nothing_is_left_in_time(sent: Callable[..., Outcome]) -> None:
    with raw_receiver(lambda connection: time.sleep(5)) as port:
        outcome = sent(f"http://127.0.0.1:{port}/", webhook_timeout_seconds=0.4)
    assert outcome.error == "no answer within 0.4 s" and outcome.seconds < 3


def test_a_slow_name_server_is_left_in_time(sent: Callable[..., Outcome], there: Receiver) -> None:
    def slow(host: str, port: int) -> list[str]:
        time.sleep(2.0)
        return ["127.0.0.1"]

    outcome = sent(there.url(NAME), slow, webhook_timeout_seconds=0.3)
    assert outcome.error == "no answer within 0.3 s" and outcome.seconds < 1.9
    assert there.messages == []


def test_an_endless_answer_is_not_read_to_its_end(sent: Callable[..., Outcome]) -> None:
    pushed = 0

    def flood(connection: socket.socket) -> None:
        nonlocal pushed
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        for _ in range(1000):
            pushed += connection.send(b"x" * 1_000_000)

    with raw_receiver(flood) as port:
        outcome = sent(f"http://127.0.0.1:{port}/")
    assert outcome.status == 200 and outcome.seconds < 5
    assert pushed < 100_000_000  # what the buffers of both ends took


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000,
        b"HTTP/1.1 20",
        b"\0" * 2000,
    ],
)
def test_what_is_no_answer_is_an_error_that_repeats_nothing(sent: Callable[..., Outcome], answer: bytes) -> None:
    with raw_receiver(lambda connection: connection.sendall(answer)) as port:
        outcome = sent(f"http://127.0.0.1:{port}/", webhook_timeout_seconds=3.0)
    assert (outcome.status, outcome.error) == (None, "the answer was not HTTP or broke off")


def test_nobody_there(sent: Callable[..., Outcome]) -> None:
    assert sent("http://127.0.0.1:9999/").error == "no connection"
    assert sent(f"http://{NAME}:9999/", one("127.0.0.1")).error == "no connection"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


def test_tls_verifies_the_name_though_the_address_is_connected_to(
    sent: Callable[..., Outcome], certificates: Path
) -> None:
    with receiver(tls=certificates) as secure:
        trusting = {"webhook_ca_file": certificates / "ca.pem", "webhook_allow_http": False}
        assert sent(secure.url(NAME, "https"), one("127.0.0.1"), **trusting).status == 204
        assert secure.sni == [NAME]
        assert secure.messages[0].headers["host"] == f"{NAME}:{secure.port}"
        wrong_name = sent(secure.url("other.test", "https"), one("127.0.0.1"), **trusting)
        unknown_authority = sent(secure.url(NAME, "https"), one("127.0.0.1"))
        for outcome in (wrong_name, unknown_authority):
            assert outcome.status is None and outcome.error is not None and outcome.error.startswith("TLS failed: ")
        assert len(secure.messages) == 1


def test_a_file_without_certificates_is_refused_at_start(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("none")
    for file in ("ca.pem", "absent.pem"):
        with pytest.raises(InvalidSettings, match="CFFA_WEBHOOK_CA_FILE"):
            require_sensible(loopback_settings(tmp_path, webhook_ca_file=tmp_path / file))


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def hooks(record_url: str, tmp_path: Path) -> Iterator[Webhooks]:
    store = JobStore(record_url)
    yield Webhooks.of(store.database, loopback_settings(tmp_path))
    store.close()


@contextlib.contextmanager
def sending(url: str, lease_seconds: float) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "tests.api.sending_process", url, str(lease_seconds)]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def over(hooks: Webhooks, webhook_id: str) -> Counter[DeliveryState]:
    found = hooks.deliveries(OWNER, webhook_id, page_size=1000).items
    return Counter(delivery.state for delivery in found)


def until(done: Callable[[], bool], seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_killed_between_sending_and_writing_it_down(hooks: Webhooks, record_url: str, there: Receiver) -> None:
    webhook_id = hooks.create(OWNER, there.url()).hook.id
    hooks.trial(OWNER, webhook_id)
    with sending(record_url, 1.0) as first:
        there.before_answer = lambda: os.kill(first.pid, signal.SIGKILL)
        there.wait(1)
        first.wait(60)
    there.before_answer = lambda: None
    with sending(record_url, 30.0):
        sent, again = there.wait(2)
        until(lambda: over(hooks, webhook_id) == {DeliveryState.DELIVERED: 1})
    assert sent.id == again.id
    assert sent.body == again.body
    (delivery,) = hooks.deliveries(OWNER, webhook_id).items
    assert delivery.tries == 2


def test_two_processes_send_each_delivery_once(hooks: Webhooks, record_url: str, there: Receiver) -> None:
    made = [hooks.create(OWNER, there.url(path=f"/{number}")).hook.id for number in range(6)]
    expected = {hooks.trial(OWNER, webhook_id).message_id for webhook_id in made for _ in range(6)}
    with sending(record_url, 30.0), sending(record_url, 30.0):
        until(lambda: all(over(hooks, webhook_id) == {DeliveryState.DELIVERED: 6} for webhook_id in made))
    assert Counter(message.id for message in there.messages) == dict.fromkeys(expected, 1)


def test_a_sender_that_is_told_to_end_waits_for_the_answer(
    tmp_path: Path, there: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    store = sqlite_store(tmp_path)
    settings = loopback_settings(tmp_path)
    hooks = Webhooks.of(store.database, settings)
    webhook_id = hooks.create(OWNER, there.url(path="/secret-token")).hook.id
    hooks.trial(OWNER, webhook_id)
    there.before_answer = lambda: time.sleep(0.5)

    async def run() -> None:
        task = asyncio.create_task(Sender(hooks, settings).run(store))
        while not there.messages:
            await asyncio.sleep(0.01)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert over(hooks, webhook_id) == {DeliveryState.DELIVERED: 1}
    assert webhook_id in caplog.text and "secret-token" not in caplog.text
    store.close()


def test_a_record_that_is_away_is_waited_for(tmp_path: Path, there: Receiver) -> None:
    """A record without a schema, as a cluster's before its set-up; then it is set up."""
    store = JobStore(f"sqlite:///{tmp_path / 'record.sqlite'}")
    settings = loopback_settings(tmp_path)
    hooks = Webhooks.of(store.database, settings)

    async def run() -> None:
        task = asyncio.create_task(Sender(hooks, settings).run(store))
        await asyncio.sleep(0.3)
        assert not task.done()
        await asyncio.to_thread(store.migrate)
        await asyncio.to_thread(lambda: hooks.trial(OWNER, hooks.create(OWNER, there.url()).hook.id))
        await asyncio.to_thread(there.wait, 1)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    store.close()
