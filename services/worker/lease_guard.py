"""Ends a child whose lease may be lost, even while the supervisor waits for a record that does not answer."""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from services.worker.child_process import ChildProcess


class LeaseGuard:
    """A watch over one unit: kills ``child`` once ``safe_seconds`` have passed since the last renewal.

    Times are of the monotonic clock. ``expired`` says that the guard acted. Use as a context manager.
    """

    def __init__(self, child: ChildProcess, safe_seconds: float, claimed: float) -> None:
        self.expired = False
        self._child = child
        self._safe_seconds = safe_seconds
        self._deadline = claimed + safe_seconds
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lease-guard", daemon=True)

    def renewed(self, at: float) -> None:
        """The lease was renewed by a request begun at ``at``."""
        self._deadline = at + self._safe_seconds

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while (left := self._deadline - time.monotonic()) > 0:
            if self._over.wait(left):
                return
        self.expired = True
        self._child.interrupt()
