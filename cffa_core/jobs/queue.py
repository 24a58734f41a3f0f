"""The queue as people and metrics see it: load, places, and what the service has measured. It only reads.

Who is served next decides ``claims``; a place in the queue is worked out from the same columns in the same order, and
a test compares the two. The arithmetic of times is in ``pace``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from cffa_core.jobs.pace import Measured, Place
from cffa_core.jobs.records import LIVE_WORKER_SECONDS, Load, QueueCounts
from cffa_core.jobs.schema import QUEUE, clock, jobs, owners, units, workers
from cffa_core.jobs.spec import REPORTS, TRAININGS, Kind
from cffa_core.jobs.state import JobState, UnitState

NEWEST_MEASURED = 20
SETTLED: sa.ColumnElement[int] = jobs.c.generated - jobs.c.rejected + jobs.c.exhausted
"""Pairs of a generation job that need no more work: made, or with a gate accepted or given up."""
WHOLE = (*REPORTS, Kind.EXPORT)  # one is like another, as far as its rate goes
_ACTIVE = (JobState.RUNNING, JobState.FINALIZING, JobState.CANCELING, JobState.PAUSING)


# Asked for at every poll, so they are put together once: that costs more than to carry them out.
_BY_STATE = sa.select(
    jobs.c.kind, jobs.c.state, sa.func.count().label("number"), sa.func.sum(jobs.c.waiting).label("units")
).group_by(jobs.c.kind, jobs.c.state)
_RUNNING = (
    sa.select(jobs.c.kind, sa.func.count().label("number"))
    .join(jobs, jobs.c.id == units.c.job_id)
    .where(units.c.state == UnitState.RUNNING.value)
    .group_by(jobs.c.kind)
)
_OLDEST = (
    sa.select(jobs.c.kind, (clock() - sa.func.min(units.c.queued_at)).label("age"))
    .join(units, sa.and_(units.c.job_id == jobs.c.id, units.c.state == UnitState.QUEUED.value))
    .where(QUEUE)
    .group_by(jobs.c.kind)
)
_LIVE_WORKERS = sa.select(workers.c.info).where(workers.c.seen_at >= clock() - LIVE_WORKER_SECONDS)


def load(connection: sa.Connection) -> Load:
    """See :meth:`JobStore.load`."""
    by_state = {(kind, state): 0 for kind in Kind for state in JobState}
    waiting = {(kind, UnitState.QUEUED): 0 for kind in Kind}
    for row in connection.execute(_BY_STATE):
        by_state[Kind(row.kind), JobState(row.state)] = row.number
        waiting[Kind(row.kind), UnitState.QUEUED] += int(row.units)
    running = {(kind, UnitState.RUNNING): 0 for kind in Kind}
    for row in connection.execute(_RUNNING):
        running[Kind(row.kind), UnitState.RUNNING] = row.number
    oldest = dict.fromkeys(Kind, 0.0)
    for row in connection.execute(_OLDEST):
        oldest[Kind(row.kind)] = max(0.0, row.age or 0.0)
    return Load(by_state, waiting | running, oldest, len(_live_workers(connection)))


def counts_by_kind(load: Load) -> dict[Kind, QueueCounts]:
    """What waits and what runs of every kind."""
    return {
        kind: QueueCounts(
            queued_jobs=load.jobs[kind, JobState.QUEUED],
            active_jobs=sum(load.jobs[kind, state] for state in _ACTIVE),
            waiting_units=load.units[kind, UnitState.QUEUED],
            running_units=load.units[kind, UnitState.RUNNING],
        )
        for kind in Kind
    }


def places(connection: sa.Connection, kind: Kind, job_ids: Collection[str]) -> dict[str, Place]:
    """Places of those of the named jobs for which something waits.

    Owners take turns, one unit each, the least recently served first; an owner's jobs go by priority, then age. So a
    job is begun in the round that follows all units its owner has before it, and jobs of one round by their owners.
    """
    size = _size(kind)

    def before(what: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
        """Sum over the jobs that the same owner has before this one."""
        order = [jobs.c.priority.desc(), jobs.c.number]
        return sa.func.coalesce(sa.func.sum(what).over(partition_by=jobs.c.owner, order_by=order, rows=(None, -1)), 0)

    lined_up = (
        sa.select(
            jobs.c.id,
            jobs.c.state,
            jobs.c.owner,
            jobs.c.waiting,
            owners.c.served_turn,
            size.label("size"),
            before(jobs.c.waiting).label("units_before"),
            before(size).label("size_before"),
        )
        .join(owners, owners.c.owner == jobs.c.owner)
        .where(QUEUE, jobs.c.kind == kind.value)
        .subquery()
    )
    line = lined_up.c
    not_begun = sa.case((line.state == JobState.QUEUED.value, 1), else_=0)
    ranked = sa.select(
        lined_up,
        sa.func.sum(not_begun).over(order_by=[line.units_before, line.served_turn, line.owner]).label("position"),
    ).subquery()
    found = connection.execute(sa.select(ranked).where(ranked.c.id.in_(sorted(job_ids)))).all()
    others = connection.execute(
        sa.select(jobs.c.owner, sa.func.sum(jobs.c.waiting).label("units"), sa.func.sum(size).label("size"))
        .where(QUEUE, jobs.c.kind == kind.value)
        .group_by(jobs.c.owner)
    ).all()
    in_hand = connection.scalar(
        sa.select(sa.func.sum(size)).where(
            jobs.c.kind == kind.value, jobs.c.state == JobState.RUNNING.value, jobs.c.waiting == 0
        )
    )
    return {
        row.id: Place(
            position=int(row.position) if row.state == JobState.QUEUED.value else None,
            units=row.waiting,
            units_before=int(row.units_before),
            size=float(row.size),
            size_before=float(row.size_before),
            others=tuple((int(other.units), float(other.size)) for other in others if other.owner != row.owner),
            in_hand=float(in_hand or 0.0),
        )
        for row in found
    }


def _size(kind: Kind) -> sa.ColumnElement[Any]:
    """What is left of a job in the unit its rate is measured in: pairs, steps of training, or the whole of it."""
    if kind in TRAININGS:
        steps: sa.ColumnElement[Any] = jobs.c.spec["steps"].as_integer()
        return steps
    if kind in WHOLE:
        return sa.literal(1)
    return jobs.c.requested - SETTLED


def measured(connection: sa.Connection, kind: Kind) -> list[Measured]:
    """What the newest jobs of a kind took: generation as far as it got, the others that came to their end."""
    query = (
        sa.select(jobs.c.spec, jobs.c.busy_seconds, SETTLED.label("settled"))
        .where(jobs.c.kind == kind.value, sa.literal_column("jobs.busy_seconds > 0", sa.Boolean()))
        .order_by(jobs.c.number.desc())
        .limit(NEWEST_MEASURED)
    )
    if kind not in (Kind.GENERATION, Kind.EDIT):
        query = query.where(jobs.c.state.in_([JobState.FINALIZING.value, JobState.SUCCEEDED.value]))
    return [Measured(row.spec, row.busy_seconds, _done(kind, row)) for row in connection.execute(query)]


def _done(kind: Kind, row: sa.Row[dict[str, Any], float, int]) -> int:
    """How much of what its rate is measured in a measured job has done."""
    if kind in TRAININGS:
        return int(row.spec["steps"])
    return 1 if kind in WHOLE else int(row.settled)


def live_workers(connection: sa.Connection, kind: Kind) -> int:
    """Workers heard of within the last minute that take this kind of job."""
    return sum(kind.value in info.get("kinds", tuple(Kind)) for info in _live_workers(connection))


def _live_workers(connection: sa.Connection) -> list[dict[str, Any]]:
    return list(connection.scalars(_LIVE_WORKERS))
