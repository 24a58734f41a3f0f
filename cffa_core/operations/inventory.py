"""Every stored object that the record points to, and whether the object store has it.

The record decides what must be there; what lies in the store beyond that is the affair of ``jobs.sweep``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from cffa_core.errors import NotFound, Problem, StorageUnavailable
from cffa_core.jobs.database import Database
from cffa_core.jobs.schema import checkpoints, datasets, models, units
from cffa_core.storage.base import ObjectInfo, ObjectStore

CHUNK = 1 << 20
ROWS = 500
OnObject = Callable[[int, int], None]


@dataclass(frozen=True)
class Verification:
    """What was looked at (objects and their bytes by the record), and what is wrong: one problem per key."""

    objects: int
    bytes: int
    problems: tuple[Problem, ...]


def pointed_objects(connection: sa.Connection) -> Iterator[ObjectInfo]:
    """Each object that a row of the record points to, once; in no particular order."""
    seen: set[str] = set()
    for column in (datasets.c.stored, models.c.stored, units.c.stored, checkpoints.c.stored):
        query = sa.select(column).where(column.is_not(None)).execution_options(yield_per=ROWS)
        for files in connection.scalars(query):
            for item in files.values():
                if item["key"] not in seen:
                    seen.add(item["key"])
                    yield ObjectInfo(item["key"], item["size"], item["sha256"])


def verify_store(
    url: str, objects: ObjectStore, *, deep: bool = False, on_object: OnObject = lambda done, total: None
) -> Verification:
    """Look for every object of the record at ``url``: it must be there with its size, and (``deep``) with its bytes.

    The service may run meanwhile: what is missing counts only if the record still points to it at the end.
    """
    database = Database(url)
    try:
        require_record(database)
        known = database.read(lambda connection: list(pointed_objects(connection)))
        wrong: dict[str, Problem] = {}
        for done, info in enumerate(known):
            on_object(done, len(known))
            found = _problem(objects, info, deep)
            if found is not None:
                wrong[info.key] = found
        on_object(len(known), len(known))
        if wrong:
            still = database.read(lambda connection: {info.key for info in pointed_objects(connection)})
            wrong = {key: problem for key, problem in wrong.items() if key in still}
    finally:
        database.close()
    return Verification(len(known), sum(info.size for info in known), tuple(wrong[key] for key in sorted(wrong)))


def require_record(database: Database) -> None:
    """Raise :class:`StorageUnavailable` where no SQLite file is: to ask it would make an empty one."""
    if database.sqlite and not (path := Path(str(database.url.database))).is_file():
        raise StorageUnavailable(f"there is no record at {path}; CFFA_HOME is to name the folder of the service")


def _problem(objects: ObjectStore, info: ObjectInfo, deep: bool) -> Problem | None:
    try:
        size = objects.size(info.key)
        if size != info.size:
            return Problem(info.key, "wrong_size", f"it has {size} bytes, the record says {info.size}")
        if deep and (digest := _sha256(objects, info.key)) != info.sha256:
            return Problem(info.key, "wrong_bytes", f"its SHA-256 is {digest}, the record says {info.sha256}")
    except NotFound:
        return Problem(info.key, "missing", "it is not in the object store")
    return None


def _sha256(objects: ObjectStore, key: str) -> str:
    digest = hashlib.sha256()
    with objects.open(key) as stream:
        while block := stream.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
