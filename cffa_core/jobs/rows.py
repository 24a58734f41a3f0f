"""Rows of the record <-> the values of ``records``; ids, times, page tokens. No statement is run here."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.records import Checkpoint, Counts, Dataset, Event, Model, Page, Part
from cffa_core.jobs.state import JobState, UnitKind, UnitState
from cffa_core.storage.manifest import stored_from_json

T = TypeVar("T")

ID_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
MAX_PAGE_SIZE = 1000


def new_id(prefix: str) -> str:
    """Mint ``prefix_`` + 20 random characters of ``[0-9a-z]`` (103 bits)."""
    return f"{prefix}_{''.join(secrets.choice(ID_ALPHABET) for _ in range(20))}"


def moment(seconds: float) -> datetime:
    """A database time as an aware UTC datetime."""
    return datetime.fromtimestamp(seconds, UTC)


def page_limits(page_size: int, page_token: str | None) -> tuple[int, int | None]:
    """Validate paging arguments; returns the size and the number below which the page starts (None: at the top).

    Raises :class:`InvalidSpec` with the pointer ``/page_size`` or ``/page_token``.
    """
    if not 1 <= page_size <= MAX_PAGE_SIZE:
        problem = Problem("/page_size", "out_of_range", f"page_size must lie in 1..{MAX_PAGE_SIZE}")
        raise InvalidSpec(problem.message, problems=(problem,))
    if page_token is None:
        return page_size, None
    if not (page_token.isascii() and page_token.isdecimal() and len(page_token) < 19):
        problem = Problem("/page_token", "bad_token", "page_token must be the next_token of an earlier page")
        raise InvalidSpec(problem.message, problems=(problem,))
    return page_size, int(page_token)


def as_page(items: Sequence[T], numbers: Sequence[int], page_size: int) -> Page[T]:
    """Cut ``page_size + 1`` fetched items to a page; the token is the last shown row's number."""
    more = len(items) > page_size
    return Page(tuple(items[:page_size]), str(numbers[page_size - 1]) if more else None)


def counts_of(row: sa.Row[Any]) -> Counts:
    """Pairs of a row of ``jobs`` by outcome; what a failed job did not get to has failed."""
    settled = row.generated - row.rejected + row.exhausted
    missed = row.requested - settled if row.state == JobState.FAILED.value else 0
    return Counts(row.requested, row.generated, row.accepted, row.rejected, row.exhausted + missed)


def dataset_of(row: sa.Row[Any]) -> Dataset:
    """A row of ``datasets``."""
    return Dataset(
        id=row.id,
        owner=row.owner,
        name=row.name,
        digest=row.digest,
        pairs=row.pairs,
        report=row.report,
        stored=stored_from_json(row.stored),
        created_at=moment(row.created_at),
        version=row.version,
        parent_id=row.parent_id,
        split=row.split,
    )


def model_of(row: sa.Row[Any]) -> Model:
    """A row of ``models``."""
    return Model(
        id=row.id,
        owner=row.owner,
        job_id=row.job_id,
        digest=row.digest,
        card=row.card,
        stored=stored_from_json(row.stored),
        created_at=moment(row.created_at),
    )


def checkpoint_of(row: sa.Row[Any], job_id: str) -> Checkpoint:
    """A row of ``checkpoints``."""
    return Checkpoint(
        job_id=job_id,
        step=row.step,
        attempt=row.attempt,
        stored=stored_from_json(row.stored),
        created_at=moment(row.created_at),
    )


def part_of(row: sa.Row[Any]) -> Part:
    """A row of ``units`` whose work is done."""
    return Part(
        job_id=row.job_id,
        unit_id=row.id,
        kind=UnitKind(row.kind),
        index=row.idx,
        state=UnitState(row.state),
        attempt=row.attempt,
        stored=stored_from_json(row.stored),
        info=row.info or {},
    )


def event_of(row: sa.Row[Any]) -> Event:
    """A row of ``events``."""
    return Event(job_id=row.job_id, seq=row.seq, at=moment(row.at), type=row.type, data=row.data)
