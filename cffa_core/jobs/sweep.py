"""Removal of stored objects that no row will ever point to.

A worker that died after storing its files but before its commit leaves them behind, and so does a deleted job, or one
whose time to be kept is over. The record decides what is garbage; this module only compares the two. Freeing expired
leases is ``JobStore.sweep``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from cffa_core.jobs.records import Footprint
from cffa_core.jobs.state import UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.storage.base import ObjectStore

JOBS_PREFIX = "jobs/"
_PART = re.compile(r"parts/(?P<index>\d+)/a(?P<attempt>\d+)/")
_CHECKPOINT = re.compile(r"checkpoints/\d+/a(?P<attempt>\d+)/")
_RESULT = re.compile(r"(?P<unit>[a-z0-9_]+)/a(?P<attempt>\d+)/")


def orphans(store: JobStore, objects: ObjectStore) -> int:
    """Delete all objects below ``jobs/`` that nothing points to and nothing can come to point to; returns how many.

    Kept are: what rows point to, and what the live attempt of a unit wrote. The record is asked after the keys were
    listed: attempts only rise, so that a key whose attempt is not live by then can never be committed any more.
    """
    deleted = 0
    for key in garbage(store, objects):
        objects.delete(key)
        deleted += 1
    return deleted


def expired(store: JobStore, objects: ObjectStore) -> int:
    """Expire the jobs that are due: the record first, then their objects; returns how many jobs.

    If this is interrupted in between, :func:`orphans` removes what is left.
    """
    number = 0
    for job_id in store.expirable():
        keys = store.expire_job(job_id)
        for key in keys or ():
            objects.delete(key)
        number += keys is not None
    return number


def garbage(store: JobStore, objects: ObjectStore) -> Iterator[str]:
    """Keys that :func:`orphans` would delete."""
    for job_id, keys in groupby(objects.list(JOBS_PREFIX), key=lambda key: key.split("/")[1]):
        listed = list(keys)
        footprint = store.footprint(job_id)
        for key in listed:
            if key not in footprint.keys and _is_dead(footprint, key.removeprefix(f"{JOBS_PREFIX}{job_id}/")):
                yield key


def _is_dead(footprint: Footprint, name: str) -> bool:
    """Whether the attempt that wrote an object can no longer commit it."""
    if not footprint.exists:
        return True
    if match := _PART.match(name):
        unit = (UnitKind.PART, int(match["index"]))
    elif match := _CHECKPOINT.match(name):
        unit = (UnitKind.TRAIN, 0)
    elif (match := _RESULT.match(name)) and match["unit"] in footprint.unit_names:
        unit = footprint.unit_names[match["unit"]]
    else:
        return False  # not a key this version writes: leave it alone
    attempt, live = footprint.units.get(unit, (0, False))
    written_by = int(match["attempt"])
    return written_by < attempt or (written_by == attempt and not live)
