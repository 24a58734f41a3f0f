"""How a worker takes a unit and keeps it: claim, numerics key, renewal.

Leases are compared with the database's clock only. What the worker writes with its claim is in ``results``, how the
claim ends otherwise in ``endings``.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal

import sqlalchemy as sa

from cffa_core.errors import NotFound, NumericsMismatch
from cffa_core.jobs.locked import LockedJob, take_claimed
from cffa_core.jobs.records import Claim, Order, Progress
from cffa_core.jobs.rows import checkpoint_of
from cffa_core.jobs.schema import QUEUE, checkpoints, clock, jobs, owners, units
from cffa_core.jobs.spec import SPEC_VERSION, GenerationSpec
from cffa_core.jobs.state import CLAIMABLE, JobState, UnitKind, UnitState


@dataclass(frozen=True)
class Asking:
    """A worker that asks for a unit, and what it may get; see :meth:`JobStore.claim`. ``cap`` 0 means no limit."""

    worker_id: str
    kinds: tuple[str, ...]
    lease_seconds: float
    prefer_job: str | None = None
    numerics: str | None = None
    avoid: tuple[str, ...] = ()
    cap: int = 0

    def suits(self) -> list[sa.ColumnElement[bool]]:
        """Conditions on a job's row: something waits in it that this worker may take."""
        found = [QUEUE, jobs.c.kind.in_(self.kinds), jobs.c.spec_version <= SPEC_VERSION]
        if self.avoid:
            found.append(jobs.c.id.not_in(self.avoid))
        if self.numerics is not None:
            found.append(
                sa.or_(
                    jobs.c.numerics_key.is_(None),
                    sa.func.substr(jobs.c.numerics_key, 1, len(self.numerics)) == self.numerics,
                    jobs.c.state == JobState.FINALIZING.value,
                )
            )
        return found


def too_new(connection: sa.Connection, kinds: Collection[str]) -> tuple[int, int] | None:
    """See :meth:`JobStore.too_new`."""
    number, newest = connection.execute(
        sa.select(sa.func.count(), sa.func.max(jobs.c.spec_version)).where(
            QUEUE, jobs.c.kind.in_(kinds), jobs.c.spec_version > SPEC_VERSION
        )
    ).one()
    return (number, newest) if number else None


def in_turn(connection: sa.Connection, asking: Asking) -> list[tuple[str, int]]:
    """Owners for whom something waits and who are below their cap, with their turns, in the order of service."""
    query = sa.select(owners.c.owner, owners.c.served_turn).where(
        sa.exists().where(jobs.c.owner == owners.c.owner, *asking.suits()).correlate(owners)
    )
    if asking.cap:
        busy = _running().group_by(jobs.c.owner).having(sa.func.count() >= asking.cap)
        query = query.where(owners.c.owner.not_in(busy.with_only_columns(jobs.c.owner)))
    rows = connection.execute(query.order_by(owners.c.served_turn, owners.c.owner)).all()
    return [(row.owner, row.served_turn) for row in rows]


def take(
    connection: sa.Connection, asking: Asking, owner: str, turn: int | None
) -> Claim | Literal["nothing", "passed"]:
    """Claim the next unit of an owner, under the lock of the owner's row.

    With ``turn`` nobody is waited for: ``passed`` says that another worker is being served from this owner, or has been
    since ``turn`` was read. Without, the owner's lock is waited for.
    """
    lock = sa.select(owners.c.owner).where(owners.c.owner == owner).with_for_update(skip_locked=turn is not None)
    if turn is not None:
        lock = lock.where(owners.c.served_turn == turn)
    if connection.scalar(lock) is None:
        return "passed"
    if asking.cap:
        running = connection.execute(_running().where(jobs.c.owner == owner)).scalar_one()
        if running >= asking.cap:
            return "nothing"
    while (job_id := _next_job(connection, asking, owner)) is not None:
        claim = _take_unit(connection, asking, owner, job_id)
        if claim is not None:
            return claim
        # It changed before it was locked, or its count of waiting units is wrong until the next sweep.
        asking = replace(asking, avoid=(*asking.avoid, job_id))
    return "nothing"


def _running() -> sa.Select[int]:
    """Number of units that workers hold."""
    return (
        sa.select(sa.func.count())
        .select_from(units)
        .join(jobs, jobs.c.id == units.c.job_id)
        .where(units.c.state == UnitState.RUNNING.value)
    )


def _next_job(connection: sa.Connection, asking: Asking, owner: str) -> str | None:
    """The owner's job to serve next: highest priority, then the one the worker has loaded, then the oldest.

    Asked kind by kind, so that each question is one step into the index of the queue, however long it is.
    """
    best: tuple[int, int, str] | None = None
    for kind in asking.kinds:
        open_jobs = [jobs.c.owner == owner, jobs.c.kind == kind, *asking.suits()]
        row = connection.execute(
            sa.select(jobs.c.priority, jobs.c.number, jobs.c.id)
            .where(*open_jobs)
            .where(jobs.c.priority == sa.select(sa.func.max(jobs.c.priority)).where(*open_jobs).scalar_subquery())
            .order_by(jobs.c.number)
            .limit(1)
        ).one_or_none()
        if row is not None:
            found = (-row.priority, row.number, row.id)
            best = found if best is None else min(best, found)
    if best is not None and asking.prefer_job is not None:
        loaded = sa.select(jobs.c.id).where(
            jobs.c.id == asking.prefer_job, jobs.c.owner == owner, jobs.c.priority == -best[0], *asking.suits()
        )
        return connection.scalar(loaded) or best[2]
    return None if best is None else best[2]


def _take_unit(connection: sa.Connection, asking: Asking, owner: str, job_id: str) -> Claim | None:
    """Claim the next unit of a job of a locked owner; None if the job changed before it was locked."""
    try:
        job = LockedJob.take(connection, job_id)
    except NotFound:
        return None
    unit = connection.execute(
        sa.select(units)
        .where(units.c.job_id == job_id, units.c.state == UnitState.QUEUED.value)
        .order_by(units.c.idx)
        .limit(1)
    ).one_or_none()
    if unit is None or job.state not in CLAIMABLE:
        job.settle()  # counts again what waits: an older version of the code does not keep the count
        job.save()
        return None
    attempt = unit.attempt + 1
    connection.execute(
        units.update()
        .where(units.c.id == unit.id)
        .values(
            state=UnitState.RUNNING.value,
            attempt=attempt,
            worker_id=asking.worker_id,
            lease_expires_at=clock() + asking.lease_seconds,
            claimed_at=clock(),
            stage=None,
            pace_since=None,
            reported_at=None,
        )
    )
    latest_turn = sa.select(sa.func.max(owners.c.served_turn)).scalar_subquery()
    connection.execute(owners.update().where(owners.c.owner == owner).values(served_turn=latest_turn + 1))
    job.note("claimed", unit=unit.kind, index=unit.idx, attempt=attempt, worker=asking.worker_id)
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
        worker_id=asking.worker_id,
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
    fixed = isinstance(held.spec, GenerationSpec) and held.spec.regenerates is not None
    if pinned is not None and (fixed or _bound(connection, held)):
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
    if job.state is JobState.PAUSING:
        return "pause"
    return "wish" if job.row.wishes and held.kind is UnitKind.TRAIN else "continue"
