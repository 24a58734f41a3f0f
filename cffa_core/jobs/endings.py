"""How a claim ends without a result: given back, crashed, failed, or its lease ran out.

A unit goes back to the queue unless its job is over or it used up its chances; then the job fails with the reason.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cffa_core.errors import NotFound
from cffa_core.jobs.locked import LockedJob, take_claimed
from cffa_core.jobs.records import Claim
from cffa_core.jobs.schema import clock, jobs, units
from cffa_core.jobs.state import CLAIMABLE, JobState, UnitKind, UnitState

_CLAIMABLE = sorted(state.value for state in CLAIMABLE)


def release(connection: sa.Connection, held: Claim, reason: str | None = None) -> None:
    """See :meth:`JobStore.release`."""
    job, unit = take_claimed(connection, held)
    reason = _text(reason)
    if held.kind is UnitKind.TRAIN:
        job.worked(unit)
    job.free(unit.id)
    job.note("released", unit=unit.kind, index=unit.idx, attempt=held.attempt, reason=reason)
    if reason is not None and not job.over:
        job.set(reason=reason)
    job.settle()
    job.save()


def crashed(
    connection: sa.Connection,
    held: Claim,
    reason: str,
    made_progress: bool,
    max_crashes: int,
    max_between: int,
    detail: str | None = None,
) -> bool:
    """See :meth:`JobStore.crashed`."""
    job, unit = take_claimed(connection, held)
    reason, detail = _text(reason) or "", _text(detail)
    if held.kind is UnitKind.TRAIN:
        job.worked(unit)
    crashes = 0 if made_progress else unit.crashes + 1
    between = unit.crashes_since_result + 1
    job.note("crashed", unit=unit.kind, index=unit.idx, attempt=held.attempt, reason=reason, detail=detail)
    counts = {"crashes": crashes, "crashes_since_result": between}
    alive = not job.over and crashes < max_crashes and between < max_between
    if alive or job.over:
        job.free(unit.id, **counts)
        if alive:
            job.set(reason=reason)
        job.settle()
    else:
        _end_unit(
            job, unit, "crashed", f"the worker process died {max(crashes, between)} times; last: {reason}", counts
        )
    job.save()
    return alive


def fail(connection: sa.Connection, held: Claim, code: str, message: str) -> None:
    """See :meth:`JobStore.fail`."""
    job, unit = take_claimed(connection, held)
    _end_unit(job, unit, code, _text(message) or "", {})
    job.save()


def _end_unit(job: LockedJob, unit: sa.Row[Any], code: str, message: str, counts: dict[str, int]) -> None:
    """Fail a unit, and with it its job unless that is over already."""
    job.connection.execute(
        units.update()
        .where(units.c.id == unit.id)
        .values(state=UnitState.FAILED.value, worker_id=None, lease_expires_at=None, finished_at=clock(), **counts)
    )
    job.note("failed", unit=unit.kind, index=unit.idx, attempt=unit.attempt, code=code, message=message)
    if not job.over:
        job.set(reason=code, error={"code": code, "message": message, "unit": unit.kind, "index": unit.idx})
    job.settle()


def expired_jobs(connection: sa.Connection) -> list[str]:
    """Jobs with a unit whose lease ran out, jobs that only wait for their units to stop, and jobs whose waiting units
    are not counted (older versions of the code, which may run beside this one, do not keep the count)."""
    late = sa.select(units.c.job_id).where(units.c.state == UnitState.RUNNING.value, units.c.lease_expires_at < clock())
    stopping = sa.select(jobs.c.id).where(jobs.c.state.in_([JobState.CANCELING.value, JobState.PAUSING.value]))
    waiting = sa.exists().where(units.c.job_id == jobs.c.id, units.c.state == UnitState.QUEUED.value).correlate(jobs)
    uncounted = sa.select(jobs.c.id).where(jobs.c.state.in_(_CLAIMABLE), jobs.c.waiting == 0, waiting)
    return sorted({found for query in (late, stopping, uncounted) for found in connection.scalars(query)})


def expire(connection: sa.Connection, job_id: str, max_expiries: int) -> int:
    """Free the expired leases of one job, looked at again under its lock; returns how many."""
    try:
        job = LockedJob.take(connection, job_id)
    except NotFound:
        return 0
    late = connection.execute(
        sa.select(units).where(
            units.c.job_id == job_id,
            units.c.state == UnitState.RUNNING.value,
            units.c.lease_expires_at < clock(),
        )
    ).all()
    before = job.state
    for unit in late:
        expiries = unit.expiries + 1
        job.note("worker_lost", unit=unit.kind, index=unit.idx, attempt=unit.attempt, worker=unit.worker_id)
        if expiries >= max_expiries and not job.over:
            message = f"{expiries} workers in a row were lost while working on it"
            _end_unit(job, unit, "worker_lost", message, {"expiries": expiries})
        else:
            job.free(unit.id, expiries=expiries)
            if not job.over:
                job.set(reason="worker_lost")
    job.settle()
    if late or job.state is not before or job.recounted:
        job.save()
    return len(late)


def _text(said: str | None) -> str | None:
    """What a process said, without characters that no database stores (NUL, halves of surrogate pairs)."""
    return None if said is None else said.replace("\0", "\ufffd").encode("utf-8", "replace").decode()
