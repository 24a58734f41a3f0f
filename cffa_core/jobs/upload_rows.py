"""Uploads in progress: which files were announced, under which keys they arrive, and what became of them.

An upload is open until it became a data set, was given up by its owner, or expired. Each function takes the caller's
open connection; the bytes are the business of ``cffa_core.storage.direct_upload``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import Conflict, NotFound
from cffa_core.jobs.paging import newest_first
from cffa_core.jobs.records import Page
from cffa_core.jobs.rows import moment
from cffa_core.jobs.schema import clock
from cffa_core.jobs.service_tables import uploads

OPEN, DONE = "open", "done"


@dataclass(frozen=True)
class AnnouncedFile:
    """One file that is to come: its ``path`` in the data set, its ``size`` in bytes, the ``key`` it is stored under.

    A large file comes in parts of ``part_bytes`` through the object store's multipart upload ``multipart_id``.
    """

    path: str
    size: int
    key: str
    multipart_id: str | None = None
    part_bytes: int | None = None


@dataclass(frozen=True)
class Upload:
    """A folder on its way in. ``options`` are those of the check that it will go through."""

    id: str
    owner: str
    name: str
    files: tuple[AnnouncedFile, ...]
    options: dict[str, Any]
    bytes: int
    state: str
    dataset_id: str | None
    created_at: datetime
    expires_at: datetime


def add(
    connection: sa.Connection,
    owner: str,
    upload_id: str,
    name: str,
    files: Sequence[AnnouncedFile],
    options: dict[str, Any],
    seconds: float,
) -> Upload:
    """See :meth:`JobStore.add_upload`."""
    if connection.scalar(sa.select(uploads.c.id).where(uploads.c.id == upload_id)) is None:
        now = connection.scalar(sa.select(clock())) or 0.0
        connection.execute(
            uploads.insert().values(
                id=upload_id,
                owner=owner,
                name=name,
                files={"files": [asdict(file) for file in files], "options": options},
                bytes=sum(file.size for file in files),
                state=OPEN,
                created_at=now,
                expires_at=now + seconds,
            )
        )
    return get(connection, owner, upload_id)


def get(connection: sa.Connection, owner: str, upload_id: str) -> Upload:
    """See :meth:`JobStore.get_upload`."""
    row = connection.execute(
        sa.select(uploads).where(uploads.c.id == upload_id, uploads.c.owner == owner)
    ).one_or_none()
    if row is None:
        raise NotFound(f"no upload {upload_id}")
    return _upload(row)


def page(connection: sa.Connection, owner: str, page_size: int, page_token: str | None) -> Page[Upload]:
    """See :meth:`JobStore.list_uploads`."""
    query = sa.select(uploads).where(uploads.c.owner == owner)
    found = newest_first(connection, query, uploads.c.number, page_size, page_token)
    return Page(tuple(_upload(row) for row in found.items), found.next_token)


def hold(connection: sa.Connection, owner: str, upload_id: str, seconds: float) -> Upload:
    """See :meth:`JobStore.hold_upload`."""
    found = get(connection, owner, upload_id)
    until = clock() + seconds
    connection.execute(
        uploads.update().where(uploads.c.id == upload_id, uploads.c.expires_at < until).values(expires_at=until)
    )
    return found


def finish(connection: sa.Connection, owner: str, upload_id: str, dataset_id: str) -> None:
    """See :meth:`JobStore.finish_upload`."""
    get(connection, owner, upload_id)
    connection.execute(uploads.update().where(uploads.c.id == upload_id).values(state=DONE, dataset_id=dataset_id))


def remove(connection: sa.Connection, owner: str, upload_id: str) -> Upload:
    """See :meth:`JobStore.remove_upload`."""
    found = get(connection, owner, upload_id)
    if found.state == DONE:
        raise Conflict(f"upload {upload_id} has become data set {found.dataset_id}; delete that")
    connection.execute(uploads.delete().where(uploads.c.id == upload_id))
    return found


def expired(connection: sa.Connection) -> list[Upload]:
    """Uploads of any owner whose time is over, finished ones too."""
    rows = connection.execute(sa.select(uploads).where(uploads.c.expires_at < clock()).limit(100))
    return [_upload(row) for row in rows]


def forget(connection: sa.Connection, upload_id: str) -> None:
    """Strike out an expired upload whose objects are gone."""
    connection.execute(uploads.delete().where(uploads.c.id == upload_id, uploads.c.expires_at < clock()))


def is_open(connection: sa.Connection, upload_id: str) -> bool:
    """Whether files of this upload may still arrive."""
    return connection.scalar(sa.select(uploads.c.state).where(uploads.c.id == upload_id)) == OPEN


def _upload(row: sa.Row[Any]) -> Upload:
    return Upload(
        id=row.id,
        owner=row.owner,
        name=row.name,
        files=tuple(AnnouncedFile(**file) for file in row.files["files"]),
        options=row.files["options"],
        bytes=row.bytes,
        state=row.state,
        dataset_id=row.dataset_id,
        created_at=moment(row.created_at),
        expires_at=moment(row.expires_at),
    )
