"""Receipts: how a transaction whose COMMIT got no answer is recognised afterwards.

Every change of a job writes events, and an event's job, number and time belong to one transaction alone. So the newest
event that a transaction writes is its receipt: it is there if, and only if, the transaction was committed.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from cffa_core.jobs.schema import events, jobs

_KEY = "cffa_receipt"


@dataclass(frozen=True)
class Receipt:
    """One event: its job, its number, and its time by the database's clock."""

    job_id: str
    seq: int
    at: float


def leave(connection: sa.Connection, receipt: Receipt) -> None:
    """Note what the open transaction is to be recognised by."""
    connection.info[_KEY] = receipt


def take(connection: sa.Connection) -> Receipt | None:
    """The receipt left in this transaction, if any; the connection forgets it."""
    found = connection.info.pop(_KEY, None)
    return found if isinstance(found, Receipt) else None


def landed(connection: sa.Connection, receipt: Receipt) -> bool:
    """Whether the transaction that wrote the receipt was committed.

    The job is locked first: a transaction that is still being committed holds that lock until it is decided.
    """
    connection.execute(sa.select(jobs.c.id).where(jobs.c.id == receipt.job_id).with_for_update())
    at = connection.scalar(sa.select(events.c.at).where(events.c.job_id == receipt.job_id, events.c.seq == receipt.seq))
    return at == receipt.at
