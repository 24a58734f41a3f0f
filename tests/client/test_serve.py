"""``cffa serve`` as a process: restarts what dies, stops what it started, leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.client.servers import ServerDied, Servers


class Serve:
    """A running ``cffa serve`` and what it said."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.client.cli", "serve", "--home", str(home), *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def url(self) -> str:
        found = re.search(r"CFFA is at (http://\S+)", self.text)
        assert found, self.text
        return found.group(1)

    def children(self) -> dict[str, int]:
        """Process ids of the children by module."""
        listed = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        ).stdout
        lines = [line.split() for line in listed.splitlines()]
        return {line[-1]: int(line[0]) for line in lines if line[-1].startswith("services.")}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(30)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


def until(true: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def ready(url: str) -> bool:
    with contextlib.suppress(OSError):
        urllib.request.urlopen(f"{url}/readyz", timeout=2).close()
        return True
    return False


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    running = Serve(tmp_path / "home", "--port", "0")
    try:
        until(lambda: "CFFA is at" in running.text)
        yield running
    finally:
        running.close()


def test_what_dies_is_started_again_and_all_stop_together(serve: Serve) -> None:
    before = serve.children()
    assert set(before) == {"services.api", "services.worker"}
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    until(lambda: set(serve.children()) == set(before) and not set(serve.children().values()) & set(before.values()))
    until(lambda: ready(serve.url))
    assert "ended by signal 9; starting it again" in serve.text
    now = serve.children()
    serve.process.terminate()
    assert serve.process.wait(20) == 0
    assert not any(alive(pid) for pid in now.values())
    assert not ready(serve.url)


def test_every_line_is_json_where_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFFA_LOG_FORMAT", "json")
    running = Serve(tmp_path / "home", "--port", "0")
    try:
        until(lambda: "CFFA is at" in running.text, 60)
    finally:
        running.close()
    own = [line["message"] for line in map(json.loads, running.said) if line["logger"] == "cffa.serve"]
    assert own[0].startswith("CFFA is at http://") and own[-1] == "stopping"


def test_children_end_when_serve_is_killed(serve: Serve) -> None:
    children = serve.children()
    serve.process.kill()
    until(lambda: not any(alive(pid) for pid in children.values()), 15)


def test_a_port_in_use_is_a_plain_error(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        refused = Serve(tmp_path / "home", "--port", str(other.getsockname()[1]))
        assert refused.process.wait(20) == 1
        refused.close()
    assert refused.text.startswith("error: cannot listen on 127.0.0.1")
    assert "--port" in refused.text
    assert not (tmp_path / "home").exists()


def test_a_server_that_refuses_its_settings_is_not_started_again(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "home", host="0.0.0.0", logs=tmp_path / "logs")
    with servers, pytest.raises(ServerDied, match="loopback"):
        servers.wait_ready(20)
    assert servers.children[0].codes == [2]
