"""The supervisor's handle of its child: start, send, receive, end. Knows processes and pipes, not units."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Sequence

from pydantic import ValidationError

from services.worker.protocol import REPORTS, Message, Report

CLOSE_SECONDS = 2.0
SHORT_SPIN = {"GOMP_SPINCOUNT": "10000"}
"""OpenMP threads spin shortly, then sleep: as fast alone, and other work on the machine gets the time (docs/log.md)."""


class ChildProcess:
    """One running child of one job. Its standard error is the worker's own."""

    def __init__(self, command: Sequence[str], job_id: str, *, threads: int) -> None:
        self.job_id = job_id
        self._process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Every numeric library of the child, not only torch, uses the same number of threads.
            env={**SHORT_SPIN, **os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"},
            # A session of its own: Ctrl-C in a terminal goes to the supervisor, which asks the child to stop.
            start_new_session=True,
        )
        self._reports: queue.Queue[Report | None] = queue.Queue()
        self._garbled: str | None = None
        self._ended = False
        self._reader = threading.Thread(target=self._read, name=f"child-{self._process.pid}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether the child is gone and everything it said has been received."""
        return self._ended

    @property
    def usable(self) -> bool:
        """Whether the child can take an order."""
        return not self._ended and self._process.poll() is None

    def send(self, message: Message) -> None:
        """Send one message; if the child is gone, :meth:`receive` will tell."""
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                stdin.write(message.line())
                stdin.flush()

    def receive(self, timeout: float) -> Report | None:
        """The next report, or None if none came within ``timeout`` seconds or the child has ended."""
        try:
            report = self._reports.get(timeout=0 if self._ended else timeout)
        except queue.Empty:
            return None
        self._ended = self._ended or report is None
        return report

    def interrupt(self) -> None:
        """Kill the process and leave the rest to :meth:`receive`; safe from any thread."""
        self._process.kill()

    def kill(self) -> None:
        """End the child at once."""
        self._process.kill()
        self._clean_up()

    def close(self) -> None:
        """End the child by closing its pipe; it is killed if that does not help."""
        self._close_stdin()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        self.kill()

    def exit_reason(self) -> str:
        """Why the child is gone, in words."""
        code = self._process.wait()
        if self._garbled is not None:
            return f"the child said something that is not a report: {self._garbled}"
        if code >= 0:
            return f"the child ended with exit code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"the child was ended by {name}{hint}"

    def _read(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            if not line.endswith(b"\n"):
                break  # it died while it spoke
            try:
                self._reports.put(REPORTS.validate_json(line))
            except ValidationError:
                self._garbled = line[:200].decode(errors="replace")
                self._process.kill()
                break
        self._reports.put(None)

    def _close_stdin(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()

    def _clean_up(self) -> None:
        self._close_stdin()
        self._process.wait()
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._ended = True
