"""How much one owner may have: unfinished jobs, pairs in kept generation jobs, stored bytes.

The service's own limits come from the settings; an account may have others (``accounts.limits``). Functions take the
caller's open connection: what is asked for is counted and written in one transaction, under the lock of the owner's
row, so that two requests at once cannot both take the last place. Requests per minute are the API's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from cffa_core.errors import QuotaExceeded, TooManyActiveJobs
from cffa_core.jobs.schema import checkpoints as checkpoint_rows
from cffa_core.jobs.schema import datasets, jobs, models, owners, units
from cffa_core.jobs.service_tables import accounts, uploads
from cffa_core.jobs.spec import JobSpec, PairGrid
from cffa_core.jobs.state import TERMINAL, JobState

T = TypeVar("T")
_OVER = [state.value for state in TERMINAL]


@dataclass(frozen=True)
class Limits:
    """The most that an owner may have of each; 0 means no limit."""

    active_jobs: int = 0
    pairs: int = 0
    bytes: int = 0

    def changed(self, own: Mapping[str, int]) -> Limits:
        """These limits, apart from those that an account has of its own."""
        return Limits(**{**asdict(self), **{name: value for name, value in own.items() if name in asdict(self)}})


@dataclass(frozen=True)
class Usage:
    """What an owner has: jobs that are not over, pairs asked for in generation jobs that are kept, stored bytes."""

    active_jobs: int
    pairs: int
    bytes: int


def limits_of(connection: sa.Connection, owner: str, defaults: Limits) -> Limits:
    """The limits that hold for an owner, who needs no account."""
    own = connection.scalar(sa.select(accounts.c.limits).where(accounts.c.owner == owner))
    return defaults.changed(own or {})


def usage_of(connection: sa.Connection, owner: str) -> Usage:
    """What an owner has now. Counting the bytes reads every list of stored files that the owner has."""
    return Usage(_active_jobs(connection, owner), _pairs(connection, owner), _bytes(connection, owner, coming=True))


def require_room(connection: sa.Connection, owner: str, defaults: Limits, spec: JobSpec | None = None) -> None:
    """Raise :class:`QuotaExceeded` unless the owner may have one more unfinished job (a new one, if ``spec`` is given).

    Locks the owner's row where there is something to count; no lock of a job may be held yet (lock order).
    """
    limits = limits_of(connection, owner, defaults)
    if limits == Limits():
        return
    hold_owner(connection, owner)
    if limits.active_jobs and (has := _active_jobs(connection, owner)) >= limits.active_jobs:
        raise TooManyActiveJobs(
            f"{has} of {limits.active_jobs} unfinished jobs are there; wait until one of them is over, or cancel one"
        )
    more = len(spec.indices) if isinstance(spec, PairGrid) else 0
    if limits.pairs and more and (has := _pairs(connection, owner)) + more > limits.pairs:
        raise QuotaExceeded(
            f"{more} pairs more than the {has} in kept generation and edit jobs are over the limit of {limits.pairs}; "
            "delete such jobs that are not needed any more, or ask an admin for more"
        )
    if limits.bytes and (has := _bytes(connection, owner, coming=False)) >= limits.bytes:
        raise _no_bytes(has, 0, limits.bytes)


def require_bytes(connection: sa.Connection, owner: str, more: int, defaults: Limits) -> None:
    """Raise :class:`QuotaExceeded` if ``more`` bytes would surely be too many: asked before they are sent, no lock."""
    limit = limits_of(connection, owner, defaults).bytes
    if limit and (has := _bytes(connection, owner, coming=True)) + more > limit:
        raise _no_bytes(has, more, limit)


def within_bytes(
    connection: sa.Connection, owner: str, defaults: Limits, add: Callable[[], T], *, coming: bool = False
) -> T:
    """What ``add()`` returns, unless the owner has too many bytes after it: then :class:`QuotaExceeded` undoes it.

    Counting afterwards counts an object that several data sets share once. ``coming`` counts what uploads that have
    begun may still bring: wanted where one begins, not where it becomes a data set and would be counted twice. Locks
    the owner's row first.
    """
    limit = limits_of(connection, owner, defaults).bytes
    if not limit:
        return add()
    hold_owner(connection, owner)
    made = add()
    if (has := _bytes(connection, owner, coming=coming)) > limit:
        raise _no_bytes(has, 0, limit)
    return made


def hold_owner(connection: sa.Connection, owner: str) -> None:
    """Lock the owner's row, made if there is none, until the transaction ends (SQLite: the file is locked anyway)."""
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    connection.execute(insert(owners).values(owner=owner, served_turn=0).on_conflict_do_nothing())
    connection.execute(sa.select(owners.c.owner).where(owners.c.owner == owner).with_for_update())


def _no_bytes(has: int, more: int, limit: int) -> QuotaExceeded:
    asked = f"{more} bytes more than the {has} that are stored" if more else f"{has} stored bytes"
    return QuotaExceeded(
        f"{asked} are over the limit of {limit}; delete jobs or data sets that are not needed any more, or ask an "
        "admin for more"
    )


def _active_jobs(connection: sa.Connection, owner: str) -> int:
    query = sa.select(sa.func.count()).where(jobs.c.owner == owner, jobs.c.state.not_in(_OVER))
    return connection.scalar(query) or 0


def _pairs(connection: sa.Connection, owner: str) -> int:
    query = sa.select(sa.func.sum(jobs.c.requested)).where(
        jobs.c.owner == owner, jobs.c.state != JobState.EXPIRED.value
    )
    return int(connection.scalar(query) or 0)


def _bytes(connection: sa.Connection, owner: str, *, coming: bool) -> int:
    """Each stored object once, however many rows point to it; and (``coming``) what open uploads have announced."""
    own_units = sa.select(units.c.id).join(jobs, jobs.c.id == units.c.job_id).where(jobs.c.owner == owner)
    objects = sa.union(
        _objects(connection, datasets.c.stored, datasets.c.owner == owner),
        _objects(connection, models.c.stored, models.c.owner == owner),
        _objects(connection, units.c.stored, units.c.id.in_(own_units)),
        _objects(connection, checkpoint_rows.c.stored, checkpoint_rows.c.unit_id.in_(own_units)),
    ).subquery()
    stored = connection.scalar(sa.select(sa.func.sum(objects.c.size)))
    announced = sa.select(sa.func.sum(uploads.c.bytes)).where(uploads.c.owner == owner, uploads.c.state == "open")
    return int(stored or 0) + int((coming and connection.scalar(announced)) or 0)


def _objects(
    connection: sa.Connection, stored: sa.Column[object], whose: sa.ColumnElement[bool]
) -> sa.Select[str, int]:
    """Key and size of every object in a column of ``{name: {"key", "size", "sha256"}}``."""
    size: sa.ColumnElement[int]
    if connection.dialect.name == "sqlite":
        files = sa.func.json_each(stored).table_valued("key", "value")
        key = sa.func.json_extract(files.c.value, "$.key", type_=sa.String)
        size = sa.func.json_extract(files.c.value, "$.size", type_=sa.BigInteger)
    else:
        files = sa.func.jsonb_each(stored).table_valued(
            sa.column("key", sa.String), sa.column("value", postgresql.JSONB)
        )
        key = files.c.value["key"].astext
        size = sa.cast(files.c.value["size"].astext, sa.BigInteger)
    rows = stored.table.join(files, sa.true())  # an implicit LATERAL: the function reads the row before it
    return sa.select(key.label("key"), size.label("size")).select_from(rows).where(whose, stored.is_not(None))
