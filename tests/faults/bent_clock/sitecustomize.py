"""Sets the wall clock of a Python process off by ``BENT_CLOCK_SECONDS``: first on its path, read before anything else.

Durations are measured by the monotonic clock, which nobody can set, and stay what they are.
"""

from __future__ import annotations

import datetime
import os
import time
from typing import Any

OFFSET = float(os.environ.get("BENT_CLOCK_SECONDS", "0"))
_time, _time_ns, _gmtime, _localtime = time.time, time.time_ns, time.gmtime, time.localtime


class _Bent(datetime.datetime):
    """A ``datetime`` that asks the bent clock."""

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return cls.fromtimestamp(time.time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return cls.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)

    @classmethod
    def today(cls) -> Any:
        return cls.now()


if OFFSET:
    time.time = lambda: _time() + OFFSET
    time.time_ns = lambda: _time_ns() + int(OFFSET * 1e9)
    time.gmtime = lambda seconds=None: _gmtime(time.time() if seconds is None else seconds)
    time.localtime = lambda seconds=None: _localtime(time.time() if seconds is None else seconds)
    datetime.datetime = _Bent  # type: ignore[misc]
