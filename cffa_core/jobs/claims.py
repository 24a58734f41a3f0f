"""How a worker takes a unit and keeps it: claim, numerics key, renewal.

Leases are compared with the database's clock only. What the worker writes with its claim is in ``results``, how the
claim ends otherwise in ``endings``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import NotFound, NumericsMismatch
from cffa_core.jobs.locked import LockedJob, take_claimed
from cffa_core.jobs.records import Claim, Order, Progress
from cffa_core.jobs.rows import checkpoint_of
from cffa_core.jobs.schema import checkpoints, clock, jobs, owners, units
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import CLAIMABLE, JobState, UnitKind, UnitState

_CLAIMABLE = sorted(state.value for state in CLAIMABLE)


def claim(
    connection: sa.Connection,
    worker_id: str,
    kinds: Collection[Kind],
    lease_seconds: float,
    prefer_job: str | None,
    numerics: str | None,
    avoid: Collection[str],
) -> Claim | None:
    """See :meth:`JobStore.claim`."""
    waiting = sa.exists().where(units.c.job_id == jobs.c.id, units.c.state == UnitState.QUEUED.value).correlate(jobs)
    mine = [
        jobs.c.state.in_(_CLAIMABLE),
        jobs.c.kind.in_(sorted(kind.value for kind in kinds)),
        jobs.c.id.not_in(sorted(avoid)),
        waiting,
    ]
    if numerics is not None:
        mine.append(
            sa.or_(
                jobs.c.numerics_key.is_(None),
                sa.func.substr(jobs.c.numerics_key, 1, len(numerics)) == numerics,
                jobs.c.state == JobState.FINALIZING.value,
            )
        )
    in_turn = connection.scalars(
        sa.select(owners.c.owner)
        .where(owners.c.owner.in_(sa.select(jobs.c.owner).where(*mine)))
        .order_by(owners.c.served_turn, owners.c.owner)
    ).all()
    # First pass: owners whom no other worker is being served from right now. Second: wait for one that is.
    for skip_locked in (True, False):
        for owner in in_turn:
            lock = sa.select(owners.c.owner).where(owners.c.owner == owner).with_for_update(skip_locked=skip_locked)
            if connection.scalar(lock) is None:
                continue
            taken = _take_unit(connection, worker_id, owner, mine, prefer_job, lease_seconds)
            if taken is not None:
                return taken
    return None


def _take_unit(
    connection: sa.Connection,
    worker_id: str,
    owner: str,
    mine: list[sa.ColumnElement[bool]],
    prefer_job: str | None,
    lease_seconds: float,
) -> Claim | None:
    """Claim the next unit of a locked owner."""
    job_id = connection.scalar(
        sa.select(jobs.c.id)
        .where(jobs.c.owner == owner, *mine)
        .order_by(jobs.c.priority.desc(), (jobs.c.id != (prefer_job or "")), jobs.c.number)
        .limit(1)
    )
    if job_id is None:
        return None
    try:
        job = LockedJob.take(connection, job_id)
    except NotFound:  # deleted between the two statements
        return None
    unit = connection.execute(
        sa.select(units)
        .where(units.c.job_id == job_id, units.c.state == UnitState.QUEUED.value)
        .order_by(units.c.idx)
        .limit(1)
    ).one_or_none()
    if unit is None or job.state not in CLAIMABLE:
        return None
    attempt = unit.attempt + 1
    connection.execute(
        units.update()
        .where(units.c.id == unit.id)
        .values(
            state=UnitState.RUNNING.value,
            attempt=attempt,
            worker_id=worker_id,
            lease_expires_at=clock() + lease_seconds,
            claimed_at=clock(),
            stage=None,
            pace_since=None,
            reported_at=None,
        )
    )
    latest_turn = sa.select(sa.func.max(owners.c.served_turn)).scalar_subquery()
    connection.execute(owners.update().where(owners.c.owner == owner).values(served_turn=latest_turn + 1))
    job.note("claimed", unit=unit.kind, index=unit.idx, attempt=attempt, worker=worker_id)
    job.set(reason=None)
    job.settle()
    job.save()
    checkpoint = connection.execute(
        sa.select(checkpoints).where(checkpoints.c.unit_id == unit.id).order_by(checkpoints.c.step.desc()).limit(1)
    ).one_or_none()
    return Claim(
        job_id=job_id,
        unit_id=unit.id,
        kind=UnitKind(unit.kind),
        index=unit.idx,
        attempt=attempt,
        worker_id=worker_id,
        owner=owner,
        spec=job.spec,
        numerics_key=job.row.numerics_key,
        checkpoint=checkpoint_of(checkpoint, job_id) if checkpoint is not None else None,
    )


def pin_numerics(connection: sa.Connection, held: Claim, key: str) -> None:
    """See :meth:`JobStore.pin_numerics`."""
    job, _ = take_claimed(connection, held)
    pinned = job.row.numerics_key
    if pinned == key:
        return
    if pinned is not None and _bound(connection, held):
        raise NumericsMismatch(f"job {held.job_id} is pinned to {pinned!r}; this worker computes as {key!r}")
    job.set(numerics_key=key)
    job.note("numerics", key=key)
    job.save()


def _bound(connection: sa.Connection, held: Claim) -> bool:
    """Whether anything of the job already depends on its numerics key."""
    results = sa.select(units.c.id).where(
        units.c.job_id == held.job_id,
        units.c.id != held.unit_id,
        units.c.state.in_([UnitState.DONE.value, UnitState.RUNNING.value]),
    )
    saved = (
        sa.select(checkpoints.c.unit_id)
        .join(units, units.c.id == checkpoints.c.unit_id)
        .where(units.c.job_id == held.job_id)
    )
    return any(connection.scalar(query.limit(1)) is not None for query in (results, saved))


def renew(connection: sa.Connection, held: Claim, lease_seconds: float, progress: Progress | None) -> Order:
    """See :meth:`JobStore.renew`."""
    job, unit = take_claimed(connection, held)
    values: dict[str, Any] = {"lease_expires_at": clock() + lease_seconds}
    if progress is not None and (progress.stage, progress.current, progress.total) != (
        unit.stage,
        unit.current,
        unit.total,
    ):
        values |= {"stage": progress.stage, "current": progress.current, "total": progress.total}
        values["reported_at"] = job.now
        # A rate is measured within one stage of one attempt: loading says nothing about sampling.
        if progress.stage != unit.stage or unit.pace_since is None or progress.current < unit.pace_from:
            values |= {"pace_from": progress.current, "pace_since": job.now}
        job.save()
    connection.execute(units.update().where(units.c.id == unit.id).values(values))
    if job.over:
        return "cancel"
    return "pause" if job.state is JobState.PAUSING else "continue"
