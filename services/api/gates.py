"""What a gate kept out of a generation job: refused pairs with the reason, their archives, and slots left empty."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter

from cffa_core.errors import CorruptArtifact, NotFound
from cffa_core.jobs.records import Part
from cffa_core.jobs.spec import MAX_TRIES
from cffa_core.jobs.state import UnitKind
from cffa_core.storage.manifest import read_verified
from services.api.access import Backend, JobId, Owner, TheBackend
from services.api.archives import archive_view
from services.api.missing_products import not_made
from services.api.paging import PageSize, PageToken, offset_of
from services.api.pair_schemas import ExhaustedList, ExhaustedView, RejectList, RejectView, scored
from services.api.pairs import finished_parts, first_part, job_with_pairs
from services.api.problems import documented
from services.api.product_schemas import ArchiveView

router = APIRouter(tags=["results"])


@router.get(
    "/v1/jobs/{job_id}/rejects",
    operation_id="listRejects",
    summary="Pairs that the gate refused",
    responses=documented(404, 409, 410, 422, 503),
)
def list_rejects(
    job_id: JobId, backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> RejectList:
    """Refused pairs of all finished parts, by index and try, each with the reasons. Empty for a job without a gate."""
    first = divmod(offset_of(page_token), MAX_TRIES)
    _, spec = job_with_pairs(backend, owner, job_id)
    found: list[RejectView] = []
    for part in finished_parts(backend, owner, job_id, first_part(spec, first[0])):
        for raw in _listed(backend, part, "rejects.json", "pairs"):
            if (raw["index"], raw["try"]) >= first:
                fields = scored(part.index, raw) | {"reasons": raw["reasons"]}
                found.append(RejectView.model_validate(fields))
        if len(found) > page_size:
            break
    following = None
    if len(found) > page_size:
        following = str(found[page_size].index * MAX_TRIES + found[page_size].attempt)
    return RejectList(items=found[:page_size], next_page_token=following)


@router.get(
    "/v1/jobs/{job_id}/exhausted",
    operation_id="listExhausted",
    summary="Slots of which no try passed the gate",
    responses=documented(404, 409, 410, 422, 503),
)
def list_exhausted(
    job_id: JobId, backend: TheBackend, owner: Owner, page_size: PageSize = 50, page_token: PageToken = None
) -> ExhaustedList:
    """Empty slots of all finished parts, by index: number of tries and the best that any of them reached."""
    _, spec = job_with_pairs(backend, owner, job_id)
    first = offset_of(page_token)
    found: list[ExhaustedView] = []
    for part in finished_parts(backend, owner, job_id, first_part(spec, first)):
        listed = _listed(backend, part, "part.json", "exhausted")
        found += [ExhaustedView(**raw, part=part.index) for raw in listed if raw["index"] >= first]
        if len(found) > page_size:
            break
    following = str(found[page_size].index) if len(found) > page_size else None
    return ExhaustedList(items=found[:page_size], next_page_token=following)


@router.get(
    "/v1/jobs/{job_id}/archives/{number}/rejects",
    operation_id="getRejectsArchive",
    summary="The refused pairs of one part",
    responses=documented(404, 409, 410, 422, 503),
)
def get_rejects_archive(job_id: JobId, number: int, backend: TheBackend, owner: Owner) -> ArchiveView:
    """A zip of the pairs that the gate refused in part `number`; its manifest says why. 404 if none was."""
    job, spec = job_with_pairs(backend, owner, job_id)
    if not 0 <= number < spec.parts:
        raise NotFound(f"job {job_id} has the parts 0 to {spec.parts - 1}")
    parts = backend.store.parts(owner, job_id, kind=UnitKind.PART, first=number, limit=1)
    if not parts or parts[0].index != number:
        raise not_made(job, f"part {number}")
    if "rejects.zip" not in parts[0].stored.files:
        raise NotFound(f"no pair of part {number} was refused")
    refused = int(parts[0].info["gate"]["rejected"])
    return archive_view(backend, parts[0], "rejects.zip", number, refused, f"{job_id}-rejects-{number:05d}.zip")


def _listed(backend: Backend, part: Part, name: str, field: str) -> list[dict[str, Any]]:
    """A list in a JSON file of a finished part; empty if the part has no such file, or an older one without it."""
    if name not in part.stored.files or "gate" not in part.info:
        return []
    try:
        found: list[dict[str, Any]] = json.loads(read_verified(backend.objects, part.stored.files[name]))[field]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{name} of part {part.index} is not readable") from error
    return found
