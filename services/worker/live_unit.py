"""The unit a supervisor has in hand, and what can become of it. Values only; the rules are in ``supervisor``."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from cffa_core.jobs.records import Claim, Progress, Wish
from services.worker.child_process import ChildProcess
from services.worker.lease_guard import LeaseGuard


@dataclass(frozen=True)
class Outcome:
    """What became of a claim.

    ``avoid_seconds``: leave this job to others for so long. ``unwell``: the child died before it got to the job's own
    work, so the fault is the worker's and it should rest before it claims anything.
    """

    kind: Literal["done", "released", "crashed", "failed", "lost"]
    avoid_seconds: float = 0.0
    unwell: bool = False


@dataclass
class LiveUnit:
    """The unit in hand. Times are of the monotonic clock.

    ``renewed`` is when the last renewal was asked for, ``moved`` when the child's step counter last rose (for a new
    unit it lies in the future: starting may take that long), ``deadline`` when a child asked to stop is killed.
    ``told`` are wishes of the job's owner that the child has heard of.
    """

    claim: Claim
    child: ChildProcess
    guard: LeaseGuard
    renewed: float
    moved: float
    steps: int = 0
    progress: Progress | None = None
    metrics: deque[tuple[int, dict[str, float]]] = field(default_factory=deque)
    prepared: bool = False
    checkpoints: int = 0
    stopping: str | None = None
    deadline: float = 0.0
    told: set[tuple[Wish, float]] = field(default_factory=set)
    released_because: str | None = None
    avoid_seconds: float = 0.0
