"""Things that are done every so many seconds by one loop: which of them is due now."""

from __future__ import annotations

import time
from collections.abc import Callable


class Intervals:
    """When each thing is due next, by name, on the clock ``now`` (seconds); not safe to share between threads."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._next: dict[str, float] = {}

    def due(self, what: str, every: float) -> bool:
        """Whether ``what`` is to be done now: the first time, and then once ``every`` seconds."""
        now = self._now()
        if now < self._next.get(what, 0.0):
            return False
        self._next[what] = now + every
        return True
