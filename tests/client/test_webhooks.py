"""Web hooks with the typed client and the command line, against a real API and ``cffa webhook listen``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from standardwebhooks import Webhook as Verifier
from typer.testing import CliRunner, Result

from cffa_core.errors import Conflict, InvalidSpec, NotFound
from cffa_core.webhooks.messages import EventType
from cffa_core.webhooks.signing import headers, new_secret
from services.api.app import create_app
from services.client.cli import app
from services.client.client import CffaClient
from services.client.webhook_listener import CannotListen, Listener
from tests.faulty_proxy import Fault, faulty_proxy
from tests.webhook_receivers import loopback_settings, receiver


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An API of its own, which may send to loopback."""
    settings = loopback_settings(tmp_path_factory.mktemp("home"), webhook_first_pause_seconds=0.05)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), port=0, log_config=None, access_log=False))
    thread = threading.Thread(target=server.run)
    thread.start()
    end = time.monotonic() + 60
    while not (server.started and server.servers):
        assert time.monotonic() < end
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def run(url: str, *arguments: str) -> Result:
    result = CliRunner().invoke(app, ["webhook", *arguments, "--url", url])
    assert result.exit_code == 0, result.stderr
    return result


def test_a_lost_answer_makes_one_hook_and_its_secret_comes_again(url: str) -> None:
    def lost_once(number: int, head: str) -> Fault | None:
        return Fault(cut_answer_after=0) if number == 0 else None

    with (
        faulty_proxy(urlsplit(url).port or 0, lost_once) as proxy,
        CffaClient(f"http://127.0.0.1:{proxy.port}") as client,
        receiver() as there,
    ):
        made = client.webhooks.create(there.url())
        assert made.secret is not None and len(proxy.heads) == 2
        assert [hook.id for hook in client.webhooks.all()] == [made.id]
        client.webhooks.test(made.id)
        (message,) = there.wait(1)
        Verifier(made.secret).verify(message.body, message.headers)
        client.webhooks.delete(made.id)


def test_a_lost_answer_rotates_once_and_its_secret_comes_again(url: str) -> None:
    def lost_once(number: int, head: str) -> Fault | None:
        return Fault(cut_answer_after=0) if number == 0 else None

    with receiver() as there, CffaClient(url) as steady:
        made = steady.webhooks.create(there.url())
        with (
            faulty_proxy(urlsplit(url).port or 0, lost_once) as proxy,
            CffaClient(f"http://127.0.0.1:{proxy.port}") as client,
        ):
            secret = client.webhooks.rotate_secret(made.id)
            assert len(proxy.heads) == 2
        steady.webhooks.test(made.id)
        (message,) = there.wait(1)
        for known in (secret, made.secret):  # rotated twice, the first one would sign no more
            Verifier(known).verify(message.body, message.headers)
        steady.webhooks.delete(made.id)


def test_the_typed_client(url: str) -> None:
    with CffaClient(url) as client, receiver() as there:
        hooks = client.webhooks
        with pytest.raises(InvalidSpec):
            hooks.create("https://10.0.0.1/")
        made = hooks.create(there.url(), [EventType.JOB_FAILED, "job.succeeded"])
        assert made.secret is not None and made.events == ["job.failed", "job.succeeded"]
        assert hooks.get(made.id).secret is None
        there.answers = [(500, {})]
        tried = hooks.wait(made.id, hooks.test(made.id).id)
        assert tried.tries >= 1
        there.wait(2)
        sent = hooks.wait(made.id, tried.id)
        while sent.state != "delivered":
            sent = hooks.wait(made.id, tried.id)
        assert sent.body is not None and sent.body["type"] == "webhook.test"
        again = hooks.redeliver(made.id, sent.id)
        assert again.message_id == sent.message_id
        there.wait(3)
        assert [item.id for item in hooks.deliveries(made.id)] == [again.id, sent.id]
        assert hooks.rotate_secret(made.id).startswith("whsec_")
        off = hooks.update(made.id, enabled=False, events=[])
        assert (off.enabled, off.events) == (False, [])
        with pytest.raises(Conflict):
            hooks.test(made.id)
        assert made.id in [hook.id for hook in hooks.all()]
        hooks.delete(made.id)
        with pytest.raises(NotFound):
            hooks.get(made.id)


def test_the_command_line_from_listening_to_removal(url: str, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "services.client.cli", "webhook", "listen", "--port", "0", "--secret-file", "secret"],
        cwd=_folder(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(),
    ) as listening:
        try:
            assert listening.stderr is not None and listening.stdout is not None
            address = listening.stderr.readline().split()[-1]
            assert httpx.post(address, content=b"{}").status_code == 401
            assert "refused" in listening.stderr.readline()
            # The listener holds a secret of its own; the service makes another, so this one is refused.
            added = run(url, "add", address, "--event", "job.failed", "--json")
            hook = json.loads(added.stdout)
            shown = json.loads(run(url, "test", hook["id"], "--json").stdout)
            assert shown[0]["status"] == 401
            assert "secret" in listening.stderr.readline()
        finally:
            listening.terminate()
    listed = json.loads(run(url, "list", "--json").stdout)
    assert [item["url"] for item in listed if item["id"] == hook["id"]] == [address]
    assert "job.failed" in run(url, "list").stdout
    with Listener("127.0.0.1", 0, hook["secret"], on_message=lambda *_: None, on_refusal=lambda _: None) as there:
        thread = threading.Thread(target=there.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        run(url, "change", hook["id"], "--address", f"http://127.0.0.1:{there.port}/", "--everything")
        assert "delivered" in run(url, "test", hook["id"]).stdout
        assert run(url, "rotate", hook["id"]).stdout.startswith("whsec_")
        found = json.loads(run(url, "deliveries", hook["id"], "--state", "delivered", "--limit", "1", "--json").stdout)
        assert json.loads(run(url, "redeliver", hook["id"], found[0]["id"], "--json").stdout)[0]["state"] == "waiting"
        there.shutdown()
        thread.join()
    assert "off" in run(url, "change", hook["id"], "--off").stdout
    run(url, "remove", hook["id"])
    assert hook["id"] not in run(url, "list").stdout


def _folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text(new_secret() + "\n")
    return tmp_path


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_the_listener_hands_on_what_was_signed_and_nothing_else() -> None:
    secret = new_secret()
    came: list[tuple[str, dict[str, object]]] = []
    refused: list[str] = []
    with Listener(
        "127.0.0.1", 0, secret, on_message=lambda *message: came.append(message), on_refusal=refused.append
    ) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        address, body = f"http://127.0.0.1:{listener.port}/", b'{"type":"job.failed"}'
        signed = headers([secret], "msg_1", int(time.time()), body)
        old = headers([secret], "msg_1", int(time.time()) - 1000, body)
        foreign = headers([new_secret()], "msg_1", int(time.time()), body)
        answers = [httpx.post(address, content=body, headers=given).status_code for given in (signed, old, foreign)]
        answers.append(
            httpx.post(address, content=b"x", headers=headers([secret], "m", int(time.time()), b"x")).status_code
        )
        answers.append(httpx.post(address, content=b"x" * (1 << 20) + b"x").status_code)
        with pytest.raises(CannotListen):
            Listener("127.0.0.1", listener.port, secret, on_message=lambda *_: None, on_refusal=refused.append)
        listener.shutdown()
        thread.join()
    assert answers == [204, 401, 401, 401, 413]
    assert came == [("msg_1", {"type": "job.failed"})]
    assert len(refused) == 3


def test_listening_needs_a_secret() -> None:
    result = CliRunner().invoke(app, ["webhook", "listen"], env={"CFFA_WEBHOOK_SECRET": ""})
    assert result.exit_code == 1
    assert "CFFA_WEBHOOK_SECRET" in result.stderr
