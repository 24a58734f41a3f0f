"""Archives of jobs that make pairs: one per finished part while it runs, one of the whole. Those of an export, too."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fastapi import APIRouter

from cffa_core.errors import NotFound
from cffa_core.jobs.records import Job, Part
from cffa_core.jobs.spec import ExportSpec, PairGrid
from cffa_core.jobs.state import UnitKind
from services.api import exports
from services.api.access import Backend, JobId, Owner, TheBackend
from services.api.missing_products import not_made
from services.api.paging import PageSize, PageToken, offset_of
from services.api.pairs import job_with_pairs
from services.api.problems import documented
from services.api.product_schemas import ArchiveList, ArchiveView

router = APIRouter(tags=["results"])


@router.get(
    "/v1/jobs/{job_id}/archives",
    operation_id="listArchives",
    summary="Archives that can be downloaded now",
    responses=documented(404, 409, 410, 422, 503),
)
def list_archives(
    job_id: JobId, backend: TheBackend, owner: Owner, page_size: PageSize = 200, page_token: PageToken = None
) -> ArchiveList:
    """Archives of finished parts, and of the whole job once it has succeeded; of an export, its archives and manifest.
    URLs are fresh, and expire."""
    if (exported := _export(backend, owner, job_id)) is not None:
        return exports.list_files(backend, owner, exported, offset_of(page_token), page_size)
    job, spec = job_with_pairs(backend, owner, job_id)
    parts = backend.store.parts(owner, job_id, kind=UnitKind.PART, first=offset_of(page_token), limit=page_size + 1)
    return ArchiveList(
        parts=[_part_view(backend, job, spec, part) for part in parts[:page_size]],
        whole=_whole(backend, owner, job, spec),
        next_page_token=str(parts[page_size].index) if len(parts) > page_size else None,
    )


@router.get(
    "/v1/jobs/{job_id}/archives/all",
    operation_id="getWholeArchive",
    summary="The archive of the whole job",
    responses=documented(404, 409, 410, 503),
)
def get_whole_archive(job_id: JobId, backend: TheBackend, owner: Owner) -> ArchiveView:
    """All pairs of a succeeded job in one zip, its manifest last; of an export, its archive, if it is one alone."""
    if (exported := _export(backend, owner, job_id)) is not None:
        return exports.get_only_file(backend, owner, exported)
    job, spec = job_with_pairs(backend, owner, job_id)
    whole = _whole(backend, owner, job, spec)
    if whole is None:
        raise not_made(job, "the archive of the whole job")
    return whole


@router.get(
    "/v1/jobs/{job_id}/archives/{number}",
    operation_id="getPartArchive",
    summary="The archive of one part",
    responses=documented(404, 409, 410, 422, 503),
)
def get_part_archive(job_id: JobId, number: int, backend: TheBackend, owner: Owner) -> ArchiveView:
    """The pairs of part `number`, as soon as it is finished; of an export, its archive `number`."""
    if (exported := _export(backend, owner, job_id)) is not None:
        return exports.get_file(backend, owner, exported, number)
    job, spec = job_with_pairs(backend, owner, job_id)
    if not 0 <= number < spec.parts:
        raise NotFound(f"job {job_id} has the parts 0 to {spec.parts - 1}")
    parts = backend.store.parts(owner, job_id, kind=UnitKind.PART, first=number, limit=1)
    if not parts or parts[0].index != number:
        raise not_made(job, f"part {number}")
    return _part_view(backend, job, spec, parts[0])


def _export(backend: Backend, owner: str, job_id: str) -> Job | None:
    """The job, if it is an export."""
    job = backend.store.get_job(owner, job_id)
    return job if isinstance(job.spec, ExportSpec) else None


def _whole(backend: Backend, owner: str, job: Job, spec: PairGrid) -> ArchiveView | None:
    parts = backend.store.parts(owner, job.id, kind=UnitKind.FINALIZE, limit=1)
    if not parts:
        return None
    pairs = parts[0].info.get("pairs", len(spec.indices))  # fewer than asked for, if a gate left slots empty
    return archive_view(backend, parts[0], "archive.zip", None, pairs, f"{job.id}.zip")


def _part_view(backend: Backend, job: Job, spec: PairGrid, part: Part) -> ArchiveView:
    pairs = len(part.info.get("pairs", spec.part_range(part.index)))
    return archive_view(backend, part, "pairs.zip", part.index, pairs, f"{job.id}-part-{part.index:05d}.zip")


def archive_view(backend: Backend, part: Part, name: str, number: int | None, pairs: int, filename: str) -> ArchiveView:
    """A stored archive with a fresh link."""
    info = part.stored.files[name]
    seconds = backend.settings.blob_url_ttl
    expires = datetime.now(UTC) + timedelta(seconds=seconds)
    return ArchiveView(
        number=number,
        pairs=pairs,
        filename=filename,
        bytes=info.size,
        sha256=info.sha256,
        url=backend.objects.download_url(info.key, expires_seconds=seconds, filename=filename, sha256=info.sha256),
        expires_at=expires,
    )
