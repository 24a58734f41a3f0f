"""What an owner does with jobs: create, cancel, pause, resume, retry, delete.

Each function takes the caller's open write transaction. How workers take and finish units is in ``claims``.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cffa_core import tracing
from cffa_core.errors import Conflict, Expired, Problem
from cffa_core.jobs import terms
from cffa_core.jobs.catalog import model_keys, pointed_keys
from cffa_core.jobs.inputs import checked_inputs, numerics_of
from cffa_core.jobs.locked import LockedJob
from cffa_core.jobs.records import USUAL_TERMS, Terms
from cffa_core.jobs.rows import new_id
from cffa_core.jobs.schema import clock, idempotency, jobs, owners, units
from cffa_core.jobs.spec import (
    SPEC_VERSION,
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EvaluationSpec,
    ExportSpec,
    JobSpec,
    PairGrid,
    TrainingSpec,
)
from cffa_core.jobs.state import CLAIMABLE, TERMINAL, JobState, UnitKind, UnitState
from cffa_core.people.quotas import Limits, require_room


def create(
    connection: sa.Connection,
    owner: str,
    job_id: str,
    spec: JobSpec,
    priority: int,
    idempotency_key: str | None,
    limits: Limits | None = None,
    asked: Terms = USUAL_TERMS,
    service_retention: float = 0.0,
) -> tuple[str, bool]:
    """See :meth:`JobStore.create_job`; returns the job's id (``job_id`` unless replayed) and whether it is new."""
    body = [spec.model_dump(mode="json"), priority, *([found] if (found := terms.posted(asked)) else [])]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    if connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == job_id)) is not None:
        return job_id, True  # an earlier try was committed after all
    if idempotency_key is not None:
        known = _replayed(connection, owner, idempotency_key, digest)
        if known is not None:
            return known, False
    spec = checked_inputs(connection, owner, spec)
    require_room(connection, owner, limits or Limits(), spec)
    if connection.scalar(sa.select(owners.c.owner).where(owners.c.owner == owner)) is None:
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        connection.execute(insert(owners).values(owner=owner, served_turn=0).on_conflict_do_nothing())
    now = connection.scalar(sa.select(clock())) or 0.0
    work = _work(spec)
    connection.execute(
        jobs.insert().values(
            id=job_id,
            owner=owner,
            kind=spec.kind.value,
            spec=spec.model_dump(mode="json"),
            spec_version=SPEC_VERSION,
            state=JobState.QUEUED.value,
            version=0,
            priority=priority,
            created_at=now,
            entered={JobState.QUEUED.value: now},
            last_seq=0,
            requested=len(spec.indices) if isinstance(spec, PairGrid) else 0,
            generated=0,
            busy_seconds=0.0,
            waiting=len(work),
            numerics_key=numerics_of(connection, owner, spec),
            **terms.columns_of(asked, now, service_retention),
        )
    )
    connection.execute(units.insert(), [new_unit(job_id, kind, index, now) for kind, index in work])
    if idempotency_key is not None:
        connection.execute(
            idempotency.insert().values(owner=owner, key=idempotency_key, body_sha256=digest, job_id=job_id)
        )
    job = LockedJob.take(connection, job_id)
    trace = tracing.traceparent()
    job.note("created", kind=spec.kind.value, **({"traceparent": trace} if trace is not None else {}))
    job.save()
    return job_id, True


def _work(spec: JobSpec) -> list[tuple[UnitKind, int]]:
    """Kind and index of each unit a job begins with."""
    if isinstance(spec, TrainingSpec | CaptionedTrainingSpec):
        return [(UnitKind.TRAIN, 0)]
    if isinstance(spec, AttentionSpec | CaptionedSpec):
        return [(UnitKind.COMPUTE, 0)]
    if isinstance(spec, EvaluationSpec):
        return [(UnitKind.EVALUATE, 0)]
    if isinstance(spec, ExportSpec):
        return [(UnitKind.EXPORT, 0)]
    return [(UnitKind.PART, part) for part in range(spec.parts)]


def new_unit(job_id: str, kind: UnitKind, index: int, now: float) -> dict[str, Any]:
    """Columns of a unit that waits for its first claim."""
    return {
        "id": new_id("unit"),
        "job_id": job_id,
        "kind": kind.value,
        "idx": index,
        "state": UnitState.QUEUED.value,
        "attempt": 0,
        "crashes": 0,
        "crashes_since_result": 0,
        "expiries": 0,
        "current": 0,
        "total": 0,
        "pace_from": 0,
        "queued_at": now,
    }


def _replayed(connection: sa.Connection, owner: str, key: str, digest: str) -> str | None:
    row = connection.execute(
        sa.select(idempotency).where(idempotency.c.owner == owner, idempotency.c.key == key)
    ).one_or_none()
    if row is None:
        return None
    if row.body_sha256 != digest:
        problem = Problem(
            "Idempotency-Key",
            "idempotency_key_reused",
            f"the idempotency key {key!r} was used with another request; use a new key",
        )
        raise Conflict(problem.message, problems=(problem,))
    return str(row.job_id)


def cancel(connection: sa.Connection, owner: str, job_id: str) -> None:
    """See :meth:`JobStore.cancel_job`."""
    job = LockedJob.take(connection, job_id, owner)
    if job.state in (JobState.CANCELING, JobState.CANCELED):
        return
    if job.state in TERMINAL:
        raise Conflict(f"job {job_id} is {job.state.value}; only an unfinished job can be cancelled")
    if job.state in (JobState.QUEUED, JobState.PAUSED):
        job.move(JobState.CANCELED)
    else:
        job.move(JobState.CANCELING)
    job.settle()
    job.save()


def pause(connection: sa.Connection, owner: str, job_id: str) -> None:
    """See :meth:`JobStore.pause_job`."""
    job = LockedJob.take(connection, job_id, owner)
    if job.state in (JobState.PAUSING, JobState.PAUSED):
        return
    if job.state is JobState.QUEUED:
        job.move(JobState.PAUSED)
    elif job.state is JobState.RUNNING:
        job.move(JobState.PAUSING)
    else:
        raise Conflict(f"job {job_id} is {job.state.value}; only a queued or running job can be paused")
    job.settle()
    job.save()


def resume(connection: sa.Connection, owner: str, job_id: str) -> None:
    """See :meth:`JobStore.resume_job`."""
    job = LockedJob.take(connection, job_id, owner)
    if job.state in CLAIMABLE:
        return
    if job.state is not JobState.PAUSED:
        raise Conflict(f"job {job_id} is {job.state.value}; only a paused job can be resumed")
    connection.execute(
        units.update()
        .where(units.c.job_id == job_id, units.c.state == UnitState.QUEUED.value)
        .values(queued_at=job.now)
    )
    job.move(JobState.QUEUED)
    job.settle()
    job.save()


def retry(connection: sa.Connection, owner: str, job_id: str) -> None:
    """See :meth:`JobStore.retry_job`."""
    job = LockedJob.take(connection, job_id, owner)
    if job.state is JobState.EXPIRED:
        raise Expired(f"what job {job_id} had finished was removed by retention; post it again")
    if job.state not in (JobState.FAILED, JobState.CANCELED):
        raise Conflict(f"job {job_id} is {job.state.value}; only a failed or canceled job can be retried")
    connection.execute(
        units.update()
        .where(
            units.c.job_id == job_id,
            units.c.state.in_([UnitState.FAILED.value, UnitState.CANCELED.value]),
        )
        .values(state=UnitState.QUEUED.value, crashes=0, crashes_since_result=0, expiries=0, queued_at=job.now)
    )
    job.set(reason=None, error=None, deadline_at=None)  # one that was missed would end it again at once
    job.move(JobState.QUEUED, reason="retry")
    job.settle()
    job.save()


def delete(connection: sa.Connection, owner: str, job_id: str) -> tuple[str, ...]:
    """See :meth:`JobStore.delete_job`."""
    job = LockedJob.take(connection, job_id, owner)
    if job.state not in TERMINAL:
        raise Conflict(f"job {job_id} is {job.state.value}; cancel it before deleting it")
    own = sa.select(units.c.id).where(units.c.job_id == job_id)
    if connection.scalar(own.where(units.c.state == UnitState.RUNNING.value).limit(1)) is not None:
        raise Conflict(f"a worker is still stopping its work on job {job_id}; try again in a moment")
    pointed = pointed_keys(connection, job_id)
    kept = model_keys(connection, job_id)
    connection.execute(jobs.delete().where(jobs.c.id == job_id))
    return tuple(sorted(pointed - kept))


def deleted(connection: sa.Connection, job_id: str) -> bool:
    """Whether a job is gone; waits for a deletion that is under way."""
    return connection.scalar(sa.select(jobs.c.id).where(jobs.c.id == job_id).with_for_update()) is None
