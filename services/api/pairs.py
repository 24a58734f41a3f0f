"""Made pairs, one by one: each PNG is served as a byte range of the archive of its part, so it is stored once.

Generated and edited pairs alike; an edited one has its mask and its sheet besides CF and FA.
"""

from __future__ import annotations

import hashlib
import io
import json
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

from fastapi import APIRouter, Request, Response

from cffa_core.errors import Conflict, CorruptArtifact, NotFound, Problem
from cffa_core.jobs.records import Job, Part
from cffa_core.jobs.spec import GenerationSpec, PairGrid
from cffa_core.jobs.state import UnitKind
from cffa_core.recipes.archive import images_of
from cffa_core.recipes.regenerate import regeneration
from cffa_core.storage.manifest import read_verified
from services.api.access import Backend, IdempotencyKey, JobId, Owner, TheBackend
from services.api.job_terms import JobTerms
from services.api.jobs import create_job
from services.api.missing_products import not_made, refuse_expired
from services.api.paging import PageSize, PageToken, offset_of
from services.api.pair_schemas import PairList, PairView, StoredImage, edited, scored
from services.api.problems import Answers, documented
from services.api.ranges import serve
from services.api.schemas import JobView

router = APIRouter(tags=["results"])
PARTS_PER_READ = 8
PNG: Answers = {
    200: {"description": "PNG", "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}
}


@router.get(
    "/v1/jobs/{job_id}/pairs",
    operation_id="listPairs",
    summary="Finished pairs of a generation or edit job",
    responses=documented(404, 409, 410, 422, 503),
)
def list_pairs(
    job_id: JobId, backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> PairList:
    """Pairs of all finished parts in index order. Parts may finish out of order, so earlier ones can appear later."""
    job, spec = job_with_pairs(backend, owner, job_id)
    first = offset_of(page_token)
    found: list[PairView] = []
    for part in finished_parts(backend, owner, job_id, first_part(spec, first)):
        found += [pair_view(job, part, raw) for raw in pairs_of(backend, part) if raw["index"] >= first]
        if len(found) > page_size:
            break
    following = str(found[page_size].index) if len(found) > page_size else None
    return PairList(items=found[:page_size], next_page_token=following)


@router.get(
    "/v1/jobs/{job_id}/pairs/{index}",
    operation_id="getPair",
    summary="One pair",
    responses=documented(404, 409, 410, 422, 503),
)
def get_pair(job_id: JobId, index: int, backend: TheBackend, owner: Owner) -> PairView:
    """Seed, digests and addresses of one pair."""
    job, part, raw = _find(backend, owner, job_id, index)
    return pair_view(job, part, raw)


@router.post(
    "/v1/jobs/{job_id}/pairs/{index}:regenerate",
    status_code=202,
    response_model=JobView,
    operation_id="regeneratePair",
    summary="Make one pair once more",
    responses=documented(403, 404, 409, 410, 422, 503),
)
def regenerate_pair(
    job_id: JobId, index: int, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue a job that draws this pair alone, on a worker with the numerics of the job that made it. Its result says
    under `regenerated` whether the two files are the same to the last bit. Pairs of generation jobs only."""
    job, _, raw = _find(backend, owner, job_id, index)
    if not isinstance(job.spec, GenerationSpec):
        raise Conflict(
            f"job {job_id} is a {job.kind} job, whose pairs are not made again one by one; post an edit of this pair"
        )
    return create_job(backend, owner, regeneration(job.spec, job.id, raw), JobTerms(), idempotency_key)


def get_image(
    request: Request,
    job_id: JobId,
    index: int,
    modality: Literal["cf", "fa", "mask", "sheet"],
    backend: TheBackend,
    owner: Owner,
) -> Response:
    """The PNG as it stands in the archive; supports Range, its ETag is its SHA-256. It is checked before it is sent.
    `mask` and `sheet` (before and after) are there for edited pairs."""
    _, part, raw = _find(backend, owner, job_id, index)
    if modality not in images_of(raw):
        raise NotFound(f"pair {index} of job {job_id} has no {modality}: it was generated, not edited")
    entry = raw[modality]
    archive = part.stored.files["pairs.zip"]

    def opened(start: int, length: int) -> BinaryIO:
        with backend.objects.open(archive.key, int(entry["offset"]), int(entry["size"])) as stream:
            image = stream.read()
        if hashlib.sha256(image).hexdigest() != entry["sha256"]:
            raise CorruptArtifact(f"image {entry['name']} of part {part.index} does not match its recorded sha256")
        return io.BytesIO(image[start : start + length])

    return serve(
        request,
        opened,
        size=int(entry["size"]),
        sha256=str(entry["sha256"]),
        media_type="image/png",
        filename=f"{job_id}-{index:06d}-{modality}.png",
        inline=True,
    )


for _method in ("GET", "HEAD"):
    router.add_api_route(
        "/v1/jobs/{job_id}/pairs/{index}/{modality}.png",
        get_image,
        methods=[_method],
        response_class=Response,
        operation_id=f"{_method.lower()}PairImage",
        summary="One image of a pair" if _method == "GET" else "Size and ETag of one image of a pair",
        responses=PNG | documented(404, 409, 410, 416, 422, 503),
    )


def job_with_pairs(backend: Backend, owner: str, job_id: str) -> tuple[Job, PairGrid]:
    """The job and its spec; raises ``Conflict`` if it is of another kind, ``Expired`` if its products were removed."""
    job = backend.store.get_job(owner, job_id)
    if not isinstance(job.spec, PairGrid):
        raise Conflict(f"job {job_id} is a {job.kind} job; only generation and edit jobs make pairs and archives")
    refuse_expired(job)
    return job, job.spec


def pairs_of(backend: Backend, part: Part) -> list[dict[str, Any]]:
    """The pairs of a finished part, as its ``part.json`` lists them; raises ``CorruptArtifact``."""
    info = part.stored.files["part.json"]
    try:
        pairs = json.loads(read_verified(backend.objects, info))["pairs"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"the index of part {part.index} is not readable") from error
    return sorted(pairs, key=lambda pair: int(pair["index"]))


def pair_view(job: Job, part: Part, raw: dict[str, Any]) -> PairView:
    """One entry of a ``part.json`` as the API shows it."""
    index = int(raw["index"])

    def image(modality: str) -> StoredImage:
        entry = raw[modality]
        url = f"/v1/jobs/{job.id}/pairs/{index}/{modality}.png"
        return StoredImage(name=entry["name"], size=entry["size"], sha256=entry["sha256"], url=url)

    images = {name: image(name) for name in images_of(raw)}
    return PairView.model_validate(scored(part.index, raw) | images | edited(raw) | {"fa_chroma": raw.get("fa_chroma")})


def first_part(spec: PairGrid, index: int) -> int:
    """The part in which the pairs from ``index`` on begin."""
    return bisect_left(spec.indices, index) // spec.part_size


def finished_parts(backend: Backend, owner: str, job_id: str, first: int) -> Iterator[Part]:
    """Finished parts from number ``first`` on, read from the record a few at a time, as far as the caller goes."""
    while True:
        parts = backend.store.parts(owner, job_id, kind=UnitKind.PART, first=first, limit=PARTS_PER_READ)
        yield from parts
        if len(parts) < PARTS_PER_READ:
            return
        first = parts[-1].index + 1


def _find(backend: Backend, owner: str, job_id: str, index: int) -> tuple[Job, Part, dict[str, Any]]:
    job, spec = job_with_pairs(backend, owner, job_id)
    number = spec.part_of(index)
    if number is None:
        whole = len(spec.indices) == spec.count
        has = f"0 to {spec.count - 1}" if whole else ", ".join(map(str, spec.indices[:5]))
        problem = Problem("path:index", "out_of_range", f"the job has the pairs {has}")
        raise NotFound(f"job {job_id} has no pair {index}", problems=(problem,))
    parts = backend.store.parts(owner, job_id, kind=UnitKind.PART, first=number, limit=1)
    if not parts or parts[0].index != number:
        raise not_made(job, f"pair {index}")
    for raw in pairs_of(backend, parts[0]):
        if raw["index"] == index:
            return job, parts[0], raw
    if isinstance(spec, GenerationSpec) and spec.gate is not None:
        problem = Problem("path:index", "exhausted", f"none of {spec.gate.max_tries} tries passed the gate")
        raise NotFound(f"pair {index} of job {job_id} was not made: no try passed the gate", problems=(problem,))
    raise not_made(job, f"pair {index}")
