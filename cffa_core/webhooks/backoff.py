"""When a delivery that failed is tried again, and when it is given up."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

FACTOR = 3.0
JITTER = 0.2


@dataclass(frozen=True)
class Backoff:
    """Pauses of ``first`` s, then three times the one before, at most ``longest`` s; each moved by up to 20 %.

    After ``tries`` tries a delivery is given up: with the defaults after 22 to 23 hours.
    """

    first: float = 5.0
    longest: float = 21_600.0
    tries: int = 12

    def pause(
        self, tries: int, asked: float | None = None, uniform: Callable[[float, float], float] = random.uniform
    ) -> float | None:
        """Seconds before the next try after ``tries`` of them, or None: give up.

        What the receiver ``asked`` for (Retry-After) is waited for, up to ``longest``.
        """
        if tries >= self.tries:
            return None
        planned = min(self.longest, self.first * FACTOR ** (tries - 1)) * uniform(1 - JITTER, 1 + JITTER)
        return max(planned, min(asked or 0.0, self.longest))
