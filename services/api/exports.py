"""Archives of an export job: its files in order, and its manifest. ``archives`` serves them at its own addresses."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cffa_core.errors import NotFound
from cffa_core.jobs.records import Job, Part
from cffa_core.jobs.state import UnitKind
from cffa_core.storage.base import ObjectInfo
from services.api.access import Backend
from services.api.missing_products import not_made, refuse_expired
from services.api.product_schemas import ArchiveList, ArchiveView, StoredFileView

MANIFEST = "manifest.json"


def list_files(backend: Backend, owner: str, job: Job, first: int, page_size: int) -> ArchiveList:
    """One page of the archives of an export, and its manifest; empty until they are written."""
    refuse_expired(job)
    exported = _unit(backend, owner, job, UnitKind.EXPORT)
    finished = _unit(backend, owner, job, UnitKind.FINALIZE)
    files = [] if exported is None else exported.info["files"]
    page = range(first, min(first + page_size, len(files)))
    return ArchiveList(
        parts=[_view(backend, exported, number) for number in page] if exported is not None else [],
        whole=None,
        manifest=None if finished is None else _manifest(backend, finished.stored.files[MANIFEST]),
        next_page_token=str(page.stop) if page.stop < len(files) else None,
    )


def get_file(backend: Backend, owner: str, job: Job, number: int) -> ArchiveView:
    """One archive of an export; raises ``NotFound`` if it has fewer, ``Conflict`` while none is made."""
    refuse_expired(job)
    exported = _unit(backend, owner, job, UnitKind.EXPORT)
    if exported is None:
        raise not_made(job, f"archive {number}")
    files = len(exported.info["files"])
    if not 0 <= number < files:
        raise NotFound(f"export {job.id} has the archives 0 to {files - 1}")
    return _view(backend, exported, number)


def get_only_file(backend: Backend, owner: str, job: Job) -> ArchiveView:
    """The archive of an export that has one; raises ``NotFound`` if it has several."""
    refuse_expired(job)
    exported = _unit(backend, owner, job, UnitKind.EXPORT)
    if exported is None:
        raise not_made(job, "the archive")
    files = len(exported.info["files"])
    if files != 1:
        raise NotFound(f"export {job.id} has {files} archives; ask for archives/0 to archives/{files - 1}")
    return _view(backend, exported, 0)


def _unit(backend: Backend, owner: str, job: Job, kind: UnitKind) -> Part | None:
    found = backend.store.parts(owner, job.id, kind=kind, limit=1)
    return found[0] if found else None


def _view(backend: Backend, exported: Part, number: int) -> ArchiveView:
    file = exported.info["files"][number]
    info = exported.stored.files[file["name"]]
    seconds = backend.settings.blob_url_ttl
    expires = datetime.now(UTC) + timedelta(seconds=seconds)
    return ArchiveView(
        number=number,
        pairs=file["pairs"],
        filename=file["name"],
        bytes=info.size,
        sha256=info.sha256,
        url=_url(backend, info, file["name"]),
        expires_at=expires,
    )


def _manifest(backend: Backend, info: ObjectInfo) -> StoredFileView:
    return StoredFileView(name=MANIFEST, bytes=info.size, sha256=info.sha256, url=_url(backend, info, MANIFEST))


def _url(backend: Backend, info: ObjectInfo, filename: str) -> str:
    seconds = backend.settings.blob_url_ttl
    return backend.objects.download_url(info.key, expires_seconds=seconds, filename=filename, sha256=info.sha256)
