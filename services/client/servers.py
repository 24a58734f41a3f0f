"""The service's own processes as children: one API, one or more workers, kept alive and stopped together.

``cffa serve``, ``cffa demo`` and a cluster without containers run on this. It starts processes by module name, watches
and restarts them, and ends only what it started; it knows nothing of jobs, HTTP routes, the record or other servers.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from cffa_core.errors import CffaError

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
STEADY_SECONDS = 60.0
REFUSED = 2  # exit code of a child that may not start with these settings: starting it again would not help


class PortInUse(CffaError):
    """Another program listens on the port the service was asked to use."""

    code = "port_in_use"


class ServerDied(CffaError):
    """A server process kept dying; the message carries the end of its log."""

    code = "server_died"
    retryable = True


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port nobody listens on at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Raise :class:`PortInUse` if ``host:port`` cannot be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As the API itself binds: a socket in TIME_WAIT of an earlier run does not count as in use.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PortInUse(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another port with --port, or 0 for any"
            ) from error


@dataclass
class Child:
    """One supervised process and its history."""

    name: str
    module: str
    log: Path | None
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    deaths: int = 0
    due: float = 0.0
    codes: list[int] = field(default_factory=list)

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the process on a leash (see :mod:`services.client.leash`), in a process group of its own.

        What the child has of its own goes over ``environment``.
        """
        out: int | IO[bytes] = 2
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            out = self.log.open("ab")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "services.client.leash", self.module],
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                env={**environment, **self.environment},
                start_new_session=True,
            )
        finally:
            if not isinstance(out, int):
                out.close()
        self.started = time.monotonic()

    def signal(self, number: int) -> None:
        """Send a signal if the process still runs; it has not been waited for, so its id is still its own."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def close(self) -> None:
        """Drop our end of the leash of a process that has ended."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()

    def tail(self, lines: int = 20) -> str:
        """The end of the log, for people."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 32_768))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])


class Servers:
    """API and workers of one home folder; use as a context manager, or ``start`` ... ``stop``.

    The children inherit this environment, over it ``environment``, and each worker over that what
    ``worker_environment(n)`` gives for n = 1, 2, ... ``on_event(name, text)`` hears of deaths and restarts. With
    ``logs`` the children write ``NAME.log`` there, otherwise to this process's standard error. A child that dies is
    restarted after 0.5 s, 1 s, 2 s ... 30 s; after ``give_up`` deaths in a row (none of them after a steady minute),
    or when it refuses to start, :meth:`check` raises :class:`ServerDied`.
    """

    def __init__(
        self,
        home: Path,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        workers: int = 1,
        mode: Literal["embedded", "cluster"] = "embedded",
        logs: Path | None = None,
        environment: Mapping[str, str] | None = None,
        worker_environment: Callable[[int], Mapping[str, str]] | None = None,
        on_event: Callable[[str, str], None] | None = None,
        give_up: int = 8,
        grace_seconds: float = 15.0,
    ) -> None:
        self.home = home.resolve()
        self.host = host
        self.port = port
        self._mode = mode
        self._extra = dict(environment or {})
        self._on_event = on_event or (lambda name, text: None)
        self._give_up = give_up
        self._grace = grace_seconds
        names: list[tuple[str, str, Mapping[str, str]]] = [("api", "services.api", {})]
        for n in range(1, workers + 1):
            own = worker_environment(n) if worker_environment else {}
            names.append(("worker" if workers == 1 else f"worker-{n}", "services.worker", own))
        self.children = [
            Child(name, module, logs / f"{name}.log" if logs else None, dict(own)) for name, module, own in names
        ]
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._failure: ServerDied | None = None

    @property
    def url(self) -> str:
        """Where this machine reaches the API."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        return f"http://{host}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the children: this one's, with home, host and port made explicit."""
        own = {
            "CFFA_MODE": self._mode,
            "CFFA_HOME": str(self.home),
            "CFFA_HOST": self.host,
            "CFFA_PORT": str(self.port),
            "PYTHONUNBUFFERED": "1",
        }
        return {**os.environ, **self._extra, **own}

    def start(self) -> None:
        """Start all children and the thread that watches them; raises :class:`PortInUse`."""
        self.port = self.port or free_port(self.host)
        require_free(self.host, self.port)
        self.home.mkdir(parents=True, exist_ok=True)
        for child in self.children:
            child.start(self.environment)
        self._watcher = threading.Thread(target=self._watch, name="servers", daemon=True)
        self._watcher.start()

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Return when the API answers ``/readyz`` (or on :meth:`interrupt`).

        Raises :class:`ServerDied` after ``timeout`` seconds or three deaths.
        """
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            self.check()
            if self.interrupted:
                return
            if self.children[0].deaths >= 3:
                break
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        raise self._died(self.children[0], "the API does not become ready")

    def check(self) -> None:
        """Raise :class:`ServerDied` if a child was given up."""
        if self._failure is not None:
            raise self._failure

    def wait(self, seconds: float | None = None) -> None:
        """Sleep until stopped, or a child is given up (raises), or ``seconds`` have passed."""
        self._stopping.wait(seconds)
        self.check()

    def interrupt(self) -> None:
        """Make :meth:`wait` return; safe inside a signal handler."""
        self._stopping.set()

    @property
    def interrupted(self) -> bool:
        """Whether :meth:`interrupt` or :meth:`stop` was called, or a child was given up."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End all children: SIGTERM, a grace period, then SIGKILL; returns when they are gone."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        for child in self.children:
            child.signal(signal.SIGTERM)
        end = time.monotonic() + self._grace
        for child in self.children:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._on_event(child.name, f"did not stop within {self._grace:.0f} s; it is being killed")
                child.process.kill()
                child.process.wait()
            child.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._stopping.wait(0.1):
            for child in self.children:
                self._tend(child)
            if self._failure is not None:
                self._stopping.set()

    def _tend(self, child: Child) -> None:
        now = time.monotonic()
        if child.process is None:
            if now >= child.due:
                child.start(self.environment)
                self._on_event(child.name, f"restarted (process {child.process.pid if child.process else '?'})")
            return
        code = child.process.poll()
        if code is None:
            return
        child.close()
        child.process = None
        child.codes.append(code)
        child.deaths = 1 if now - child.started > STEADY_SECONDS else child.deaths + 1
        if child.deaths >= self._give_up:
            self._failure = self._died(child, f"{child.name} died {child.deaths} times in a row")
            return
        if code == REFUSED:
            self._failure = self._died(child, f"{child.name} refuses to start; its log says why")
            return
        delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (child.deaths - 1))
        child.due = now + delay
        cause = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        self._on_event(child.name, f"ended {cause}; starting it again in {delay:g} s")

    def _died(self, child: Child, what: str) -> ServerDied:
        tail = child.tail()
        return ServerDied(f"{what}\n{tail}" if tail else what)
