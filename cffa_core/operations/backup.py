"""Backups: the record first, then every object it points to and every base, checked byte for byte.

A backup is a folder: ``record.sqlite`` or ``record.pgdump``, ``objects/KEY``, ``objects.jsonl`` (key, size, SHA-256 of
each), and ``manifest.json``, written last, without which it is none. Secrets are not in it. The way back is
``restore``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic.runtime.migration import MigrationContext

from cffa_core import __version__
from cffa_core.disk_files import flush, sha256_of
from cffa_core.errors import (
    Conflict,
    CorruptArtifact,
    NotFound,
    Problem,
    StorageUnavailable,
)
from cffa_core.jobs.database import Database
from cffa_core.models.fetch import SUMS, stored_bases
from cffa_core.operations.dump import dump
from cffa_core.operations.inventory import OnObject, pointed_objects, require_record
from cffa_core.storage.base import ObjectInfo, ObjectStore, key_segments

FORMAT = "cffa-backup/1"
MANIFEST, LISTING, OBJECTS = "manifest.json", "objects.jsonl", "objects"
ROUNDS = 5


@dataclass(frozen=True)
class Backup:
    """The manifest of a backup: when and of what it was made, and the digests that vouch for it."""

    created_at: str
    version: str
    database: str
    schema: str | None
    record: str
    record_sha256: str
    objects: int
    bytes: int
    listing_sha256: str


def back_up(url: str, objects: ObjectStore, folder: Path, *, on_object: OnObject = lambda done, total: None) -> Backup:
    """Write a backup of the record at ``url``, its objects and the object store's bases into ``folder``, which must be
    empty or not there.

    The service may run meanwhile. Where objects vanish between the two (a job was deleted, a checkpoint superseded),
    the record is dumped anew and what is missing copied, at most five times. Raises :class:`StorageUnavailable` if that
    does not help, :class:`CorruptArtifact` that names every object whose bytes are not the recorded ones.
    """
    if folder.exists() and any(folder.iterdir()):
        raise Conflict(f"{folder} is not empty; a backup needs a folder of its own")
    database = Database(url)
    require_record(database)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / ("record.sqlite" if database.sqlite else "record.pgdump")
    try:
        for _ in range(ROUNDS):
            schema, known = dump(database, record, lambda connection: (_schema(connection), _known(connection)))
            known = [*known, *stored_bases(objects)]
            gone = _copy(objects, known, folder / OBJECTS, on_object)
            if not gone:
                break
        else:
            raise StorageUnavailable(
                f"objects vanish faster than they are copied (e.g. {gone[0].key}); run this when less is being "
                "deleted, or see `cffa verify-store` if nothing is"
            )
    finally:
        database.close()
    _drop_others(folder / OBJECTS, {info.key for info in known})
    known.sort(key=lambda info: (info.key.endswith(f"/{SUMS}"), info.key))  # a base's sums are restored last
    listing = "".join(json.dumps(asdict(info)) + "\n" for info in known)
    (folder / LISTING).write_text(listing, encoding="utf-8")
    made = Backup(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        database=database.url.get_backend_name(),
        schema=schema,
        record=record.name,
        record_sha256=sha256_of(record),
        objects=len(known),
        bytes=sum(info.size for info in known),
        listing_sha256=sha256_of(folder / LISTING),
    )
    for path in [*folder.rglob("*"), folder]:
        flush(path)
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(made)}, indent=1) + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    flush(folder)
    return made


def read_backup(folder: Path) -> Backup:
    """The manifest of a backup, with record and listing checked; raises :class:`CorruptArtifact`."""
    try:
        found: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise CorruptArtifact(f"{folder} is no backup of this version of CFFA ({FORMAT})")
        backup = Backup(**found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{folder} is no whole backup: {MANIFEST} is missing or not readable") from error
    for name, digest in ((backup.record, backup.record_sha256), (LISTING, backup.listing_sha256)):
        path = folder / Path(name).name
        if not path.is_file() or sha256_of(path) != digest:
            raise CorruptArtifact(f"{path} is not what the backup's manifest says")
    return backup


def _schema(connection: sa.Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


def _known(connection: sa.Connection) -> list[ObjectInfo]:
    return list(pointed_objects(connection))


def _copy(objects: ObjectStore, known: list[ObjectInfo], folder: Path, on_object: OnObject) -> list[ObjectInfo]:
    """Fetch what is not there yet, each checked; returns those that are not in the store any more."""
    gone: list[ObjectInfo] = []
    damaged: list[Problem] = []
    for done, info in enumerate(known):
        on_object(done, len(known))
        path = folder.joinpath(*key_segments(info.key))
        if path.is_file() and path.stat().st_size == info.size and sha256_of(path) == info.sha256:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            objects.fetch(info, path)
        except NotFound:
            gone.append(info)
        except CorruptArtifact as error:
            damaged.append(Problem(info.key, error.code, error.message))
    on_object(len(known), len(known))
    if damaged:
        message = f"{len(damaged)} objects are not what the record, or a base's {SUMS}, says"
        raise CorruptArtifact(message, problems=tuple(damaged))
    return gone


def _drop_others(folder: Path, keys: set[str]) -> None:
    """Remove what an earlier round copied and the record of the last one does not know."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in keys:
            path.unlink()
