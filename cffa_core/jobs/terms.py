"""How long a job may take and how long its products are kept: deadlines and expiry, by the database's clock.

Each function takes the caller's open transaction. Nothing here touches objects: what expired here is deleted by
``sweep``, the record first, so that nobody is ever pointed to bytes that are gone.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, NotFound, Problem
from cffa_core.jobs.catalog import model_keys, pointed_keys
from cffa_core.jobs.locked import LockedJob
from cffa_core.jobs.records import Terms
from cffa_core.jobs.schema import checkpoints, clock, jobs, units
from cffa_core.jobs.state import TERMINAL, JobState, UnitState

LONGEST_SECONDS = 36_500 * 86_400.0
DEADLINE_EXCEEDED = "deadline_exceeded"
AT_ONCE = 100
_TERMINAL = sorted(state.value for state in TERMINAL)
_KEPT = sorted(state.value for state in TERMINAL - {JobState.EXPIRED})
_STOPPED_ANYWAY = sorted([*_TERMINAL, JobState.CANCELING.value])


def _held() -> sa.ColumnElement[bool]:
    """Whether something still needs a job's products: a worker that stops, or an unfinished job that names this one."""
    stopping = sa.exists().where(units.c.job_id == jobs.c.id, units.c.state == UnitState.RUNNING.value).correlate(jobs)
    other = jobs.alias()
    needed = (
        sa.exists()
        .where(
            other.c.owner == jobs.c.owner,
            other.c.state.not_in(_TERMINAL),
            other.c.spec["generation_job_id"].as_string() == jobs.c.id,
        )
        .correlate(jobs)
    )
    return sa.or_(stopping, needed)


OVERDUE = sa.select(jobs.c.id).where(jobs.c.deadline_at < clock(), jobs.c.state.not_in(_STOPPED_ANYWAY))
# Only a job that is over and not expired has a time to expire, so this is one step into an index.
EXPIRABLE = sa.select(jobs.c.id).where(jobs.c.expires_at < clock(), ~_held()).order_by(jobs.c.expires_at).limit(AT_ONCE)


def columns_of(terms: Terms, now: float, service_retention: float) -> dict[str, float | None]:
    """Columns of a new job; ``now`` is the database's time, ``service_retention`` (seconds, 0: for ever) the default.

    Raises :class:`InvalidSpec` if the deadline has passed, is a hundred years away, or is given twice.
    """
    deadline = None if terms.deadline_seconds is None else now + terms.deadline_seconds
    if terms.deadline_at is not None:
        if deadline is not None:
            raise _invalid("/deadline_at", "given_twice", "name deadline_seconds or deadline_at, not both")
        deadline = terms.deadline_at.timestamp()
    if deadline is not None and deadline <= now:
        raise _invalid("/deadline_at", "in_the_past", "the deadline has passed already")
    if deadline is not None and deadline > now + LONGEST_SECONDS:
        raise _invalid("/deadline_at", "too_far", "a deadline lies within a hundred years; leave it out for none")
    keep = service_retention if terms.retention_seconds is None else terms.retention_seconds
    return {"deadline_at": deadline, "retention_seconds": keep or None}


def posted(terms: Terms) -> dict[str, Any]:
    """What was posted of the terms, as JSON: the same body gives the same value, whatever the service's defaults."""
    at = terms.deadline_at.timestamp() if terms.deadline_at is not None else None
    found = {"deadline_seconds": terms.deadline_seconds, "deadline_at": at, "retention": terms.retention_seconds}
    return {name: value for name, value in found.items() if value is not None}


def overdue(connection: sa.Connection) -> list[str]:
    """Jobs that are not over although their deadline has passed."""
    return list(connection.scalars(OVERDUE))


def miss_deadline(connection: sa.Connection, job_id: str) -> bool:
    """Fail a job that is overdue, looked at again under its lock; what it has finished is kept.

    Its workers are told to stop when they next renew, as with any job that is over.
    """
    try:
        job = LockedJob.take(connection, job_id)
    except NotFound:
        return False
    deadline = job.row.deadline_at
    if job.over or deadline is None or deadline >= job.now:
        return False
    message = "the job was not over at its deadline; finished parts and checkpoints are kept, retry it to go on"
    job.set(reason=DEADLINE_EXCEEDED, error={"code": DEADLINE_EXCEEDED, "message": message})
    job.move(JobState.FAILED, reason=DEADLINE_EXCEEDED)
    job.settle()
    job.save()
    return True


def expirable(connection: sa.Connection) -> list[str]:
    """See :meth:`JobStore.expirable`."""
    return list(connection.scalars(EXPIRABLE))


def expire_job(connection: sa.Connection, job_id: str) -> tuple[str, ...] | None:
    """See :meth:`JobStore.expire_job`."""
    try:
        job = LockedJob.take(connection, job_id)
    except NotFound:
        return None
    due = connection.scalar(
        sa.select(jobs.c.id).where(jobs.c.id == job_id, jobs.c.expires_at < clock(), jobs.c.state.in_(_KEPT), ~_held())
    )
    if due is None:
        return None
    own = sa.select(units.c.id).where(units.c.job_id == job_id)
    removed = tuple(sorted(pointed_keys(connection, job_id) - model_keys(connection, job_id)))
    connection.execute(checkpoints.delete().where(checkpoints.c.unit_id.in_(own)))
    connection.execute(units.update().where(units.c.job_id == job_id).values(stored=sa.null()))
    job.move(JobState.EXPIRED, objects=len(removed))
    job.settle()
    job.save()
    return removed


def _invalid(pointer: str, code: str, message: str) -> InvalidSpec:
    return InvalidSpec(message, problems=(Problem(pointer, code, message),))
