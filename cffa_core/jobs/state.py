"""States of jobs and units, and the transitions between them, as pure functions.

Nothing here touches a database: the store asks what may happen and writes what it is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum


class JobState(StrEnum):
    """State of a job (DESIGN, States)."""

    QUEUED = "queued"
    RUNNING = "running"
    FINALIZING = "finalizing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELING = "canceling"
    CANCELED = "canceled"
    PAUSING = "pausing"
    PAUSED = "paused"
    EXPIRED = "expired"


class UnitState(StrEnum):
    """State of one unit of work."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELED = "canceled"


class UnitKind(StrEnum):
    """What a unit does. Every job ends with one ``finalize`` unit."""

    TRAIN = "train"
    PART = "part"
    EVALUATE = "evaluate"
    COMPUTE = "compute"
    EXPORT = "export"
    FINALIZE = "finalize"


COMPUTES_NOTHING = frozenset({UnitKind.EXPORT, UnitKind.FINALIZE})
"""Units that copy and write down: any worker can do them, and none needs the numeric libraries."""
TERMINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELED, JobState.EXPIRED})
TAKES_RESULTS = frozenset({JobState.RUNNING, JobState.FINALIZING, JobState.PAUSING, JobState.QUEUED})
CLAIMABLE = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.FINALIZING})

_NEXT: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset(
        {JobState.RUNNING, JobState.FINALIZING, JobState.CANCELED, JobState.PAUSED, JobState.FAILED}
    ),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.FINALIZING, JobState.FAILED, JobState.CANCELING, JobState.PAUSING}
    ),
    JobState.FINALIZING: frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELING}),
    JobState.CANCELING: frozenset({JobState.CANCELED}),
    JobState.PAUSING: frozenset({JobState.PAUSED, JobState.CANCELING, JobState.FINALIZING, JobState.FAILED}),
    JobState.PAUSED: frozenset({JobState.QUEUED, JobState.CANCELED, JobState.FAILED}),
    JobState.SUCCEEDED: frozenset({JobState.EXPIRED}),
    JobState.FAILED: frozenset({JobState.QUEUED, JobState.EXPIRED}),
    JobState.CANCELED: frozenset({JobState.QUEUED, JobState.EXPIRED}),
    JobState.EXPIRED: frozenset(),
}


def may_follow(before: JobState, after: JobState) -> bool:
    """Whether a job in ``before`` may become ``after``."""
    return after in _NEXT[before]


def derive(job: JobState, units: Iterable[tuple[UnitKind, UnitState]]) -> JobState:
    """The state a job has, given the state it was in and its units (DESIGN, Units).

    ``units`` are all units of the job, the finalize unit only once it was enqueued. A job that is being cancelled or
    paused gets there when no claim is live.
    """
    if job in TERMINAL:
        return job
    found = list(units)
    live = any(state is UnitState.RUNNING for _, state in found)
    if job is JobState.CANCELING:
        return job if live else JobState.CANCELED
    if any(state is UnitState.FAILED for _, state in found):
        return JobState.FAILED
    finalize = [state for kind, state in found if kind is UnitKind.FINALIZE]
    if finalize:
        return JobState.SUCCEEDED if finalize[0] is UnitState.DONE else JobState.FINALIZING
    if job is JobState.PAUSING:
        return job if live else JobState.PAUSED
    if job is JobState.PAUSED:
        return job
    started = live or any(state is UnitState.DONE for _, state in found)
    return JobState.RUNNING if started else JobState.QUEUED
