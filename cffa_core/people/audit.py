"""The audit log: who changed what, when, with which key. Entries are added and, after a time, removed; never changed.

What is worth an entry is decided where changes come in (the API's gate); here they are only kept and found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from cffa_core.jobs.database import Database
from cffa_core.jobs.paging import newest_first
from cffa_core.jobs.records import Page
from cffa_core.jobs.rows import moment
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import audit

DAY = 86_400.0
REMOVED_AT_ONCE = 10_000


@dataclass(frozen=True)
class AuditEntry:
    """One change: ``owner`` did ``action`` (an operation of the API) to ``target`` (an id), by the database's clock."""

    number: int
    at: datetime
    owner: str
    key_id: str | None
    action: str
    target: str | None
    request_id: str | None
    data: dict[str, Any]


class AuditLog:
    """The audit log of a record; all methods raise :class:`StorageUnavailable` when the record does not answer."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def append(
        self,
        owner: str,
        action: str,
        *,
        key_id: str | None = None,
        target: str | None = None,
        request_id: str | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an entry, durable when this returns. One whose COMMIT got no answer may be there twice."""
        values = {
            "owner": owner,
            "key_id": key_id,
            "action": action[:80],
            "target": target[:200] if target else None,
            "request_id": request_id,
            "data": dict(data or {}),
        }
        self._db.write(lambda connection: connection.execute(audit.insert().values(at=clock(), **values)))

    def entries(
        self,
        *,
        owner: str | None = None,
        action: str | None = None,
        target: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        page_size: int = 50,
        page_token: str | None = None,
    ) -> Page[AuditEntry]:
        """Entries, newest first; each filter that is given must fit. ``since`` is inclusive, ``until`` is not."""
        query = sa.select(audit)
        for column, wanted in ((audit.c.owner, owner), (audit.c.action, action), (audit.c.target, target)):
            if wanted is not None:
                query = query.where(column == wanted)
        if since is not None:
            query = query.where(audit.c.at >= since.timestamp())
        if until is not None:
            query = query.where(audit.c.at < until.timestamp())
        page = self._db.read(lambda c: newest_first(c, query, audit.c.number, page_size, page_token))
        return Page(tuple(_entry(row) for row in page.items), page.next_token)

    def forget(self, days: float) -> int:
        """Remove entries older than ``days``, the oldest first and at most 10,000 of them; returns how many."""

        def remove(connection: sa.Connection) -> int:
            old = sa.select(audit.c.number).where(audit.c.at < clock() - days * DAY).order_by(audit.c.number)
            gone = connection.execute(audit.delete().where(audit.c.number.in_(old.limit(REMOVED_AT_ONCE))))
            return gone.rowcount

        return self._db.write(remove)


def _entry(row: sa.Row[Any]) -> AuditEntry:
    return AuditEntry(
        number=row.number,
        at=moment(row.at),
        owner=row.owner,
        key_id=row.key_id,
        action=row.action,
        target=row.target,
        request_id=row.request_id,
        data=row.data,
    )
