"""A job's row, held for change: state moves, events and the unit states they follow from.

Every write to a job or its units goes through here, so that the row lock serialises them (SQLite: the whole database
is locked by ``BEGIN IMMEDIATE``). Lock order everywhere: owner, then job, then its units.
"""

from __future__ import annotations

from typing import Any, Self

import sqlalchemy as sa

from cffa_core import logs
from cffa_core.errors import LeaseLost, NotFound
from cffa_core.jobs import receipts
from cffa_core.jobs.records import Claim
from cffa_core.jobs.schema import clock, events, jobs, units
from cffa_core.jobs.spec import JobSpec, parse_spec
from cffa_core.jobs.state import CLAIMABLE, TERMINAL, JobState, UnitKind, UnitState, derive, may_follow
from cffa_core.webhooks import outbox


class LockedJob:
    """One job locked by the open transaction. Changes are kept until :meth:`save` writes them in one statement."""

    def __init__(self, connection: sa.Connection, row: sa.Row[Any]) -> None:
        self.connection = connection
        self.row = row
        self.id: str = row.id
        self.state = JobState(row.state)
        self.now: float = connection.scalar(sa.select(clock())) or 0.0
        self._entered: dict[str, float] = dict(row.entered)
        self._seq: int = row.last_seq
        self._changes: dict[str, Any] = {}
        self._busy = 0.0
        self._notes: list[dict[str, Any]] = []

    @classmethod
    def take(cls, connection: sa.Connection, job_id: str, owner: str | None = None) -> Self:
        """Lock a job, waiting for whoever has it; raises :class:`NotFound` if it is not there or not ``owner``'s."""
        query = sa.select(jobs).where(jobs.c.id == job_id).with_for_update()
        if owner is not None:
            query = query.where(jobs.c.owner == owner)
        row = connection.execute(query).one_or_none()
        if row is None:
            raise NotFound(f"no job {job_id}")
        return cls(connection, row)

    @property
    def spec(self) -> JobSpec:
        """The stored spec."""
        return parse_spec(self.row.spec)

    @property
    def over(self) -> bool:
        """Whether the job takes no more results."""
        return self.state is JobState.CANCELING or self.state in TERMINAL

    @property
    def recounted(self) -> bool:
        """Whether :meth:`settle` found another number of waiting units than the row says."""
        return bool(self._changes.get("waiting", self.row.waiting) != self.row.waiting)

    def set(self, **values: Any) -> None:
        """Change columns of the job's row."""
        self._changes.update(values)

    def note(self, event_type: str, **data: Any) -> None:
        """Add a line to the job's history, with the id of the request that caused it, if one did."""
        if (request_id := logs.bound("request_id")) is not None:
            data["request_id"] = request_id
        self._seq += 1
        self._notes.append({"job_id": self.id, "seq": self._seq, "at": self.now, "type": event_type, "data": data})

    def move(self, state: JobState, **data: Any) -> None:
        """Enter ``state``; the transition must be one that ``state.may_follow`` allows."""
        if not may_follow(self.state, state):
            raise AssertionError(f"job {self.id} may not go from {self.state} to {state}")
        self.note("state", before=self.state.value, after=state.value, **data)
        self.state = state
        self._entered[state.value] = self.now
        self._changes["state"] = state.value
        keep = self.row.retention_seconds
        kept = state in TERMINAL and state is not JobState.EXPIRED and keep is not None
        self._changes["expires_at"] = self.now + keep if kept else None
        if self.row.wishes and (state in TERMINAL or state is JobState.FINALIZING):
            self.note("not_done", wishes=sorted(self.row.wishes), reason=f"the job is {state.value}")
            self._changes["wishes"] = None

    def settle(self) -> None:
        """Follow the units to the state they imply, and withdraw waiting units of a job that is over."""
        found = self.connection.execute(
            sa.select(units.c.kind, units.c.state, sa.func.count().label("number"))
            .where(units.c.job_id == self.id)
            .group_by(units.c.kind, units.c.state)
        ).all()
        after = derive(self.state, [(UnitKind(row.kind), UnitState(row.state)) for row in found])
        if after is not self.state:
            self.move(after)
        waiting = sum(row.number for row in found if row.state == UnitState.QUEUED.value)
        self.set(waiting=waiting if self.state in CLAIMABLE else 0)
        if self.state in TERMINAL:
            self.connection.execute(
                units.update()
                .where(units.c.job_id == self.id, units.c.state == UnitState.QUEUED.value)
                .values(state=UnitState.CANCELED.value)
            )

    def save(self) -> None:
        """Write changes and history; the version rises by one."""
        if self._busy:
            self.set(busy_seconds=jobs.c.busy_seconds + self._busy)
        self.connection.execute(
            jobs.update()
            .where(jobs.c.id == self.id)
            .values(version=jobs.c.version + 1, last_seq=self._seq, entered=self._entered, **self._changes)
        )
        if self._notes:
            self.connection.execute(events.insert(), self._notes)
            receipts.leave(self.connection, receipts.Receipt(self.id, self._seq, self.now))
            if moves := outbox.announced(self._notes, self.row.entered):
                outbox.announce_job(self.connection, self.id, self.row.owner, moves)
            self._notes = []

    def free(self, unit_id: str, **values: Any) -> None:
        """End the claim on a unit: it waits for the next one, unless :meth:`settle` withdraws it with its job."""
        self.connection.execute(
            units.update()
            .where(units.c.id == unit_id)
            .values(state=UnitState.QUEUED.value, worker_id=None, lease_expires_at=None, queued_at=self.now, **values)
        )

    def worked(self, unit: sa.Row[Any]) -> None:
        """Count the time since a unit was claimed as time that this job took."""
        self._busy += max(0.0, self.now - (unit.claimed_at or self.now))


def take_claimed(connection: sa.Connection, claim: Claim) -> tuple[LockedJob, sa.Row[Any]]:
    """Lock the job and the unit of a claim; raises :class:`LeaseLost` unless the claim is the unit's live one."""
    try:
        job = LockedJob.take(connection, claim.job_id)
    except NotFound as error:
        raise LeaseLost(f"job {claim.job_id} was deleted") from error
    unit = connection.execute(
        sa.select(units)
        .where(
            units.c.id == claim.unit_id,
            units.c.attempt == claim.attempt,
            units.c.state == UnitState.RUNNING.value,
        )
        .with_for_update()
    ).one_or_none()
    if unit is None:
        raise LeaseLost(f"attempt {claim.attempt} no longer holds unit {claim.unit_id}")
    return job, unit
