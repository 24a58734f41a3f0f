"""Removal of what uploads file by file leave behind: those that expired, and files that came after their end.

The record decides what is over; this module only compares the two.
"""

from __future__ import annotations

from itertools import groupby

from cffa_core.jobs.store import JobStore
from cffa_core.jobs.upload_rows import Upload
from cffa_core.storage.base import UPLOADS_PREFIX, ObjectStore


def remove_expired(store: JobStore, objects: ObjectStore) -> int:
    """Remove uploads whose time is over, with what arrived of them; returns how many."""
    expired = store.expired_uploads()
    for upload in expired:
        remove_objects(objects, upload)
        store.forget_upload(upload.id)
    return len(expired)


def remove_strays(store: JobStore, objects: ObjectStore) -> int:
    """Delete objects of uploads that are not open: a link outlives the upload it was made for. Returns how many."""
    removed = 0
    for upload_id, keys in groupby(objects.list(UPLOADS_PREFIX), key=lambda key: key.split("/")[1]):
        listed = list(keys)
        if not store.upload_is_open(upload_id):
            for key in listed:
                objects.delete(key)
            removed += len(listed)
    return removed


def remove_objects(objects: ObjectStore, upload: Upload) -> None:
    """Delete everything that arrived of an upload."""
    direct = objects.direct()
    for file in upload.files:
        if file.multipart_id is not None:
            direct.abort(file.key, file.multipart_id)
    for key in list(objects.list(f"{UPLOADS_PREFIX}{upload.id}/")):
        objects.delete(key)
