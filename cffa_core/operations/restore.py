"""The way back from a backup: objects first, then the record, so that it never points to what is not there yet.

A restored record knows no worker of the old one: its leases are freed without penalty, and attempts jump ahead, so that
no late result of an old worker can be taken for a new one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from cffa_core.disk_files import flush, sha256_of
from cffa_core.errors import Conflict, CorruptArtifact, InvalidSettings, StorageUnavailable, VersionTooOld
from cffa_core.jobs import version
from cffa_core.jobs.database import Database
from cffa_core.jobs.locked import LockedJob
from cffa_core.jobs.schema import units, workers
from cffa_core.jobs.service_tables import uploads
from cffa_core.jobs.state import UnitState
from cffa_core.operations.backup import LISTING, OBJECTS, Backup, read_backup
from cffa_core.operations.dump import load_postgresql, load_sqlite, require_empty
from cffa_core.operations.inventory import OnObject
from cffa_core.storage.base import ObjectInfo, ObjectStore, key_segments

ATTEMPTS_AHEAD = 1000
"""More than an old worker could have claimed between the backup and the restoration."""
OWNED = ("jobs/", "datasets/", "uploads/")
"""Where a sweep removes what the record does not know."""


def restore(folder: Path, url: str, objects: ObjectStore, *, on_object: OnObject = lambda done, total: None) -> Backup:
    """Put a backup into an empty record at ``url`` and an object store without other jobs; the objects come first.

    Interrupted before the record is there, it may simply be run again. Raises :class:`CorruptArtifact` if the backup is
    not whole, :class:`VersionTooOld` if it is of a newer version than this one, :class:`Conflict` if there is a record
    already or the store holds other data.
    """
    backup = read_backup(folder)
    database = Database(url)
    try:
        if not version.knows(backup.schema):
            raise VersionTooOld(f"the backup's schema {backup.schema} is newer than this version; use the one it is of")
        if database.url.get_backend_name() != backup.database:
            raise InvalidSettings(f"the backup is of {backup.database}, CFFA_DATABASE_URL names another database")
        require_empty(database)
        keys = {info.key for info in _listed(folder)}
        for prefix in OWNED:
            for key in objects.list(prefix):
                if key not in keys:
                    raise Conflict(f"the object store holds {key}, which is not of this backup; use an empty one")
        for done, info in enumerate(_listed(folder)):
            on_object(done, backup.objects)
            _put(objects, info, folder / OBJECTS)
        on_object(backup.objects, backup.objects)
        _load(folder / backup.record, database)
    finally:
        database.close()
    return backup


def _load(source: Path, database: Database) -> None:
    """Make a dump the record, at this version's schema and free of its old workers."""
    if not database.sqlite:
        load_postgresql(source, database)
        database.migrate()
        database.write(_forget_workers)
        return
    target = Path(str(database.url.database))
    prepared = target.with_name(f"{target.name}.restoring")
    load_sqlite(source, prepared)
    copy = Database(f"sqlite:///{prepared}")
    try:
        copy.migrate()
        copy.write(_forget_workers)
        # Back to one file: what it is renamed to must not look for a log of another name.
        with copy.engine.connect().execution_options(cffa_autocommit=True) as connection:
            mode = connection.exec_driver_sql("PRAGMA journal_mode=DELETE").scalar_one()
        if mode != "delete":
            raise StorageUnavailable(f"{prepared} is in use by another process; remove it and run this again")
    finally:
        copy.close()
    flush(prepared)
    prepared.rename(target)
    flush(target.parent)


def _forget_workers(connection: sa.Connection) -> None:
    """Free all leases without penalty, raise the attempts of unfinished units, forget workers and half-way uploads."""
    connection.execute(workers.delete())
    connection.execute(uploads.delete().where(uploads.c.state.in_(["open", "checking"])))
    ahead = units.c.attempt + ATTEMPTS_AHEAD
    connection.execute(units.update().where(units.c.state != UnitState.DONE.value).values(attempt=ahead))
    held = sa.select(units.c.job_id).where(units.c.state == UnitState.RUNNING.value).distinct()
    for job_id in list(connection.scalars(held)):
        _free(connection, job_id)


def _free(connection: sa.Connection, job_id: str) -> None:
    job = LockedJob.take(connection, job_id)
    for unit_id in list(
        connection.scalars(
            sa.select(units.c.id).where(units.c.job_id == job_id, units.c.state == UnitState.RUNNING.value)
        )
    ):
        job.free(unit_id)
    job.note("restored")
    job.settle()
    job.save()


def _put(objects: ObjectStore, info: ObjectInfo, folder: Path) -> None:
    path = folder.joinpath(*key_segments(info.key))
    if not path.is_file() or path.stat().st_size != info.size or sha256_of(path) != info.sha256:
        raise CorruptArtifact(f"{path} is not what the backup's listing says")
    try:
        stored = objects.put_file(info.key, path)
    except Conflict as error:
        raise Conflict(f"the object store has another {info.key}; use an empty one") from error
    if (stored.size, stored.sha256) != (info.size, info.sha256):
        raise CorruptArtifact(f"{info.key} was stored with other bytes than were read")


def _listed(folder: Path) -> Iterator[ObjectInfo]:
    with (folder / LISTING).open(encoding="utf-8") as lines:
        for line in lines:
            yield ObjectInfo(**json.loads(line))
