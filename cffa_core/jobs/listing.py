"""Reading jobs and what belongs to them; nothing here changes a row.

Each function takes the caller's open read transaction, so that one answer is one consistent view.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import NotFound, VersionTooOld
from cffa_core.jobs.catalog import pointed_keys
from cffa_core.jobs.dataset_rows import NAMES
from cffa_core.jobs.pace import (
    Measured,
    Place,
    UnitPace,
    job_progress,
    measured_rate,
    seconds_left,
    seconds_until_done,
)
from cffa_core.jobs.paging import newest_first
from cffa_core.jobs.queue import live_workers, measured, places
from cffa_core.jobs.records import Checkpoint, Event, Footprint, Job, JobFilter, Page, Part
from cffa_core.jobs.rows import checkpoint_of, counts_of, event_of, moment, part_of
from cffa_core.jobs.schema import checkpoints as checkpoint_rows
from cffa_core.jobs.schema import events as event_rows
from cffa_core.jobs.schema import jobs, units
from cffa_core.jobs.schema import metrics as metric_rows
from cffa_core.jobs.spec import REPORTS, SPEC_VERSION, Kind, parse_spec
from cffa_core.jobs.state import TERMINAL, JobState, UnitKind, UnitState

ROUNDED_BY = 1e-6
"""Seconds: a time as it is told may lie so far after the one that is stored, and still means the same."""
_WAITS = (JobState.QUEUED.value, JobState.RUNNING.value)
# Asked for at every poll, so they are put together once: that costs more than to carry them out.
_JOB = sa.select(jobs).where(jobs.c.id == sa.bindparam("job"), jobs.c.owner == sa.bindparam("owner"))
_WORK = sa.select(units).where(
    units.c.job_id.in_(sa.bindparam("moving", expanding=True)),
    units.c.kind != UnitKind.FINALIZE.value,
    # A training job shows how far it got while it waits too; of a generation job only parts in hand matter.
    sa.or_(units.c.state == UnitState.RUNNING.value, units.c.kind == UnitKind.TRAIN.value),
)
_EVENTS = (
    sa.select(event_rows)
    .where(event_rows.c.job_id == sa.bindparam("job"), event_rows.c.seq > sa.bindparam("after"))
    .order_by(event_rows.c.seq)
    .limit(sa.bindparam("most", type_=sa.Integer))
)


def get_job(connection: sa.Connection, owner: str, job_id: str, cap: int | None) -> Job:
    """See :meth:`JobStore.get_job`; ``cap`` units of one owner run at a time (0: any number).

    With None the place in the queue is not looked up, nor the time that follows from it.
    """
    return _jobs_of(connection, [_row(connection, owner, job_id)], cap)[0]


def _row(connection: sa.Connection, owner: str, job_id: str) -> sa.Row[Any]:
    row = connection.execute(_JOB, {"job": job_id, "owner": owner}).one_or_none()
    if row is None:
        raise NotFound(f"no job {job_id}")
    return row


def list_jobs(
    connection: sa.Connection,
    owner: str,
    kind: Kind | None,
    state: JobState | None,
    page_size: int,
    page_token: str | None,
    cap: int,
    within: JobFilter,
) -> Page[Job]:
    """See :meth:`JobStore.list_jobs`."""
    query = sa.select(jobs).where(jobs.c.owner == owner)
    if kind is not None:
        query = query.where(jobs.c.kind == kind.value)
    if state is not None:
        query = query.where(jobs.c.state == state.value)
    page = newest_first(connection, query.where(*_kept_by(within)), jobs.c.number, page_size, page_token)
    return Page(tuple(_jobs_of(connection, page.items, cap)), page.next_token)


def _kept_by(within: JobFilter) -> list[sa.ColumnElement[bool]]:
    """Conditions on a job's row."""
    found: list[sa.ColumnElement[bool]] = []
    if within.created_after is not None:
        found.append(jobs.c.created_at >= within.created_after.timestamp() - ROUNDED_BY)
    if within.created_before is not None:
        found.append(jobs.c.created_at < within.created_before.timestamp() - ROUNDED_BY)
    if within.model_id is not None:
        found.append(jobs.c.spec["model_id"].as_string() == within.model_id)
    if within.dataset_id is not None:
        found.append(sa.or_(*(jobs.c.spec[name].as_string() == within.dataset_id for name in NAMES)))
    return found


def _jobs_of(connection: sa.Connection, rows: Sequence[sa.Row[Any]], cap: int | None) -> list[Job]:
    """Job rows with what is computed on reading: progress, counts, place in the queue, time left."""
    work: dict[str, list[UnitPace]] = defaultdict(list)
    moving = [row.id for row in rows if JobState(row.state) not in TERMINAL]
    for unit in connection.execute(_WORK, {"moving": moving}) if moving else ():
        work[unit.job_id].append(
            UnitPace(
                index=unit.idx,
                live=unit.state == UnitState.RUNNING.value,
                stage=unit.stage,
                current=unit.current,
                total=unit.total,
                pace_from=unit.pace_from,
                pace_since=unit.pace_since,
                reported_at=unit.reported_at,
                seconds=max(0.0, (unit.reported_at or 0.0) - (unit.claimed_at or 0.0)),
            )
        )
    found = [_timed(connection, _job_of(row, work[row.id]), work[row.id]) for row in rows]
    if cap is None:
        return found
    waits = {row.id for row in rows if row.waiting and row.state in _WAITS and not any(u.live for u in work[row.id])}
    for kind in {job.kind for job in found if job.id in waits}:
        workers = live_workers(connection, kind)
        line = places(connection, kind, [job.id for job in found if job.kind is kind and job.id in waits])
        timed = measured(connection, kind) if workers else []
        found = [_in_line(job, line[job.id], timed, workers, cap) if job.id in line else job for job in found]
    return found


def _timed(connection: sa.Connection, job: Job, work: Sequence[UnitPace]) -> Job:
    """A report in the making, with the time left by what others took; any other job as it is."""
    if job.kind not in REPORTS or not any(unit.live for unit in work):
        return job
    left = seconds_left(measured_rate(job.spec, measured(connection, job.kind)), work)
    return replace(job, progress=replace(job.progress, eta_seconds=left))


def _in_line(job: Job, place: Place, timed: Sequence[Measured], workers: int, cap: int) -> Job:
    """A job that nobody works on just now, with its place and an estimate of the time until it is done."""
    eta = seconds_until_done(place, measured_rate(job.spec, timed), workers, cap)
    return replace(job, queue_position=place.position, progress=replace(job.progress, eta_seconds=eta))


def _job_of(row: sa.Row[Any], work: Sequence[UnitPace]) -> Job:
    if row.spec_version > SPEC_VERSION:
        raise VersionTooOld(
            f"job {row.id} has spec version {row.spec_version} and this process knows {SPEC_VERSION}: replace it"
        )
    spec, state = parse_spec(row.spec), JobState(row.state)
    settled = row.generated - row.rejected + row.exhausted
    return Job(
        id=row.id,
        owner=row.owner,
        kind=Kind(row.kind),
        spec=spec,
        spec_version=row.spec_version,
        state=state,
        version=row.version,
        priority=row.priority,
        created_at=moment(row.created_at),
        entered={JobState(name): moment(at) for name, at in row.entered.items()},
        counts=counts_of(row),
        progress=job_progress(spec, state, settled, row.busy_seconds, work),
        reason=row.reason,
        error=row.error,
        result=row.result,
        numerics_key=row.numerics_key,
        deadline_at=None if row.deadline_at is None else moment(row.deadline_at),
        expires_at=None if row.expires_at is None else moment(row.expires_at),
        wishes=tuple(sorted(row.wishes or ())),
    )


def events(connection: sa.Connection, owner: str, job_id: str, after_seq: int, limit: int) -> list[Event]:
    """See :meth:`JobStore.events`."""
    _row(connection, owner, job_id)
    found = connection.execute(_EVENTS, {"job": job_id, "after": after_seq, "most": limit})
    return [event_of(row) for row in found]


def metrics(
    connection: sa.Connection, owner: str, job_id: str, key: str | None, since_step: int | None
) -> list[tuple[int, dict[str, float]]]:
    """See :meth:`JobStore.metrics`."""
    _row(connection, owner, job_id)
    query = sa.select(metric_rows).where(metric_rows.c.job_id == job_id).order_by(metric_rows.c.step, metric_rows.c.key)
    if key is not None:
        query = query.where(metric_rows.c.key == key)
    if since_step is not None:
        query = query.where(metric_rows.c.step >= since_step)
    steps: dict[int, dict[str, float]] = defaultdict(dict)
    for row in connection.execute(query):
        steps[row.step][row.key] = math.nan if row.value is None else row.value
    return list(steps.items())


def parts(
    connection: sa.Connection, owner: str, job_id: str, kind: UnitKind | None, first: int, limit: int | None
) -> list[Part]:
    """See :meth:`JobStore.parts`."""
    _row(connection, owner, job_id)
    finalize_last = sa.case((units.c.kind == UnitKind.FINALIZE.value, 1), else_=0)
    query = (
        sa.select(units)
        .where(units.c.job_id == job_id, units.c.state == UnitState.DONE.value, units.c.idx >= first)
        .where(units.c.stored.is_not(None))  # what expired is no longer there
        .order_by(finalize_last, units.c.idx)
        .limit(limit)
    )
    if kind is not None:
        query = query.where(units.c.kind == kind.value)
    return [part_of(row) for row in connection.execute(query)]


def checkpoints(connection: sa.Connection, owner: str, job_id: str) -> list[Checkpoint]:
    """See :meth:`JobStore.checkpoints`."""
    _row(connection, owner, job_id)
    query = (
        sa.select(checkpoint_rows)
        .join(units, units.c.id == checkpoint_rows.c.unit_id)
        .where(units.c.job_id == job_id)
        .order_by(checkpoint_rows.c.step)
    )
    return [checkpoint_of(row, job_id) for row in connection.execute(query)]


def footprint(connection: sa.Connection, job_id: str) -> Footprint:
    """See :meth:`JobStore.footprint`."""
    state = connection.scalar(sa.select(jobs.c.state).where(jobs.c.id == job_id))
    exists = state is not None and state != JobState.EXPIRED.value
    attempts: dict[tuple[UnitKind, int], tuple[int, bool]] = {}
    names: dict[str, tuple[UnitKind, int]] = {}
    for row in connection.execute(
        sa.select(units.c.id, units.c.kind, units.c.idx, units.c.attempt, units.c.state).where(units.c.job_id == job_id)
    ):
        unit = (UnitKind(row.kind), row.idx)
        attempts[unit] = (row.attempt, row.state == UnitState.RUNNING.value)
        names[row.id] = unit
        if unit[0] is not UnitKind.PART:
            names[row.kind] = unit
    return Footprint(exists, frozenset(pointed_keys(connection, job_id)), attempts, names)
