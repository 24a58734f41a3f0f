"""Jobs: posting, listing, watching, and the five things an owner can do to one. Results have routers of their own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import JSONResponse
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool

from cffa_core.errors import CffaError
from cffa_core.jobs.records import Job, JobFilter
from cffa_core.jobs.spec import JobSpec, Kind
from cffa_core.jobs.state import TERMINAL, JobState
from services.api.access import Backend, IdempotencyKey, JobId, Owner, TheBackend
from services.api.job_requests import EvaluationJobRequest, ExportRequest, GenerationJobRequest, TrainingJobRequest
from services.api.job_terms import JobTerms
from services.api.moments import Moment
from services.api.paging import PageSize, PageToken
from services.api.problems import Answers, documented
from services.api.ranges import etag_matches
from services.api.schemas import (
    JobList,
    JobView,
)

LONGEST_WAIT = 30
router = APIRouter(tags=["jobs"])
_NOT_CHANGED: Answers = {304: {"description": "Not changed since the version named in If-None-Match."}}
_log = logging.getLogger("cffa.api")

Wait = Annotated[int, Query(ge=0, le=LONGEST_WAIT, description="Seconds to wait for a change of the job.")]


@router.post(
    "/v1/training-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postTrainingJob",
    summary="Post a training job",
    responses=documented(400, 403, 413, 422, 503),
)
def post_training_job(
    request: TrainingJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the training of a pair method on a data set. The product is a model."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)


@router.post(
    "/v1/generation-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postGenerationJob",
    summary="Post a generation job",
    responses=documented(400, 403, 413, 422, 503),
)
def post_generation_job(
    request: GenerationJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the making of `count` pairs with a model. Parts of the result can be downloaded while the job runs."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)


@router.post(
    "/v1/evaluation-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postEvaluationJob",
    summary="Post an evaluation job",
    responses=documented(400, 403, 413, 422, 503),
)
def post_evaluation_job(
    request: EvaluationJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the measuring of pairs, made by a generation job or uploaded, against real ones. The product is a report:
    alignment, fidelity, diversity, and memorisation where the training pairs are known."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)


@router.post(
    "/v1/jobs/{job_id}/exports",
    status_code=202,
    response_model=JobView,
    operation_id="postExport",
    summary="Export pairs of a generation or edit job",
    responses=documented(400, 403, 404, 409, 410, 413, 422, 503),
)
def post_export(
    job_id: JobId, request: ExportRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the writing of chosen pairs in another form: zip, WebDataset, DICOM. It takes the parts that are finished
    now, also of a job that still runs. The products are archives of the new job."""
    return create_job(backend, owner, request.spec(job_id), request, idempotency_key)


def create_job(backend: Backend, owner: str, spec: JobSpec, on: JobTerms, key: str | None) -> Response:
    """Answer of a post: the job that was made, or that the same key made before."""
    job, created = backend.store.create_job(owner, spec, priority=on.priority, idempotency_key=key, asked=on.terms())
    headers = {"Location": f"/v1/jobs/{job.id}"}
    if created:
        backend.delivery.announce(job)
    else:
        headers["Idempotency-Replayed"] = "true"
    return _answer(job, status=202, headers=headers)


@router.get(
    "/v1/jobs",
    operation_id="listJobs",
    summary="List jobs, newest first",
    responses=documented(422, 503),
)
def list_jobs(
    backend: TheBackend,
    owner: Owner,
    kind: Kind | None = None,
    state: JobState | None = None,
    created_after: Annotated[Moment | None, Query(description="Posted then or later.")] = None,
    created_before: Annotated[Moment | None, Query(description="Posted earlier.")] = None,
    model_id: Annotated[str | None, Query(max_length=40, description="Whose spec names this model.")] = None,
    dataset_id: Annotated[str | None, Query(max_length=40, description="Whose spec names this data set.")] = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> JobList:
    """One page of jobs; every filter that is given must hold. A data set is named by trainings that learn from it,
    generations that draw its structures, and evaluations that measure or compare it."""
    within = JobFilter(created_after, created_before, model_id, dataset_id)
    page = backend.store.list_jobs(owner, kind, state, page_size, page_token, within=within)
    return JobList(items=[JobView.of(job) for job in page.items], next_page_token=page.next_token)


@router.get(
    "/v1/jobs/{job_id}",
    response_model=JobView,
    operation_id="getJob",
    summary="Get or watch a job",
    responses=_NOT_CHANGED | documented(404, 422, 503),
)
async def get_job(
    job_id: JobId,
    backend: TheBackend,
    owner: Owner,
    wait: Wait = 0,
    if_none_match: Annotated[str | None, Header(description="ETag of the version you have.")] = None,
) -> Response:
    """The job, with an ETag. `wait` holds the answer until the job changes: from the version in If-None-Match, or
    from the current one if there is no such header (then a finished job answers at once)."""
    job = await run_in_threadpool(backend.store.get_job, owner, job_id)
    now = _etag(job)

    def changed(job: Job) -> bool:
        if if_none_match is None:
            return job.state in TERMINAL or _etag(job) != now
        return not etag_matches(if_none_match, _etag(job))

    if wait and not changed(job):
        with backend.watches.of(backend.store, owner, job_id) as watch, contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                while not backend.stopping.is_set() and not changed(job):
                    job = (await watch.next()).job
    if etag_matches(if_none_match, _etag(job)):
        return Response(status_code=304, headers=_headers(job))
    return _answer(job)


def _post_action(
    verb: str, summary: str, description: str
) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    return router.post(
        f"/v1/jobs/{{job_id}}:{verb}",
        response_model=JobView,
        operation_id=f"{verb}Job",
        summary=summary,
        description=description,
        responses=documented(403, 404, 409, 410, 503),
    )


@_post_action("cancel", "Cancel a job", "`canceling` until its workers have stopped. Finished parts are kept.")
def cancel_job(job_id: JobId, backend: TheBackend, owner: Owner) -> Response:
    return _answer(backend.store.cancel_job(owner, job_id))


@_post_action("pause", "Pause a job", "`pausing` until its workers have stopped. What is done is kept.")
def pause_job(job_id: JobId, backend: TheBackend, owner: Owner) -> Response:
    return _answer(backend.store.pause_job(owner, job_id))


@_post_action("resume", "Resume a paused job", "It goes on where it stopped.")
def resume_job(job_id: JobId, backend: TheBackend, owner: Owner) -> Response:
    return _queued(backend, backend.store.resume_job(owner, job_id))


@_post_action(
    "retry",
    "Retry a failed or canceled job",
    "Finished parts and checkpoints are kept; the rest is queued, without the deadline.",
)
def retry_job(job_id: JobId, backend: TheBackend, owner: Owner) -> Response:
    return _queued(backend, backend.store.retry_job(owner, job_id))


def _queued(backend: Backend, job: Job) -> Response:
    backend.delivery.announce(job)
    return _answer(job)


@router.delete(
    "/v1/jobs/{job_id}",
    status_code=204,
    operation_id="deleteJob",
    summary="Delete a finished job",
    responses=documented(403, 404, 409, 503),
)
def delete_job(job_id: JobId, backend: TheBackend, owner: Owner) -> Response:
    """Remove a terminal job, its history and its products; the model of a training job stays."""
    keys = backend.store.delete_job(owner, job_id)
    return Response(status_code=204, background=BackgroundTask(_remove, backend, job_id, keys))


def _remove(backend: Backend, job_id: str, keys: tuple[str, ...]) -> None:
    """Delete objects that the record no longer names; one that stays is unreachable, and is logged."""
    for key in keys:
        try:
            backend.objects.delete(key)
        except CffaError:
            _log.exception("job %s is deleted, but its object %s is still stored", job_id, key)


def _etag(job: Job) -> str:
    """The place in the queue moves without a new version of the job, so it is part of the tag."""
    place = "" if job.queue_position is None else f"-q{job.queue_position}"
    return f'"{job.version}{place}"'


def _headers(job: Job) -> dict[str, str]:
    return {"ETag": _etag(job), "Cache-Control": "private, no-cache"}


def _answer(job: Job, *, status: int = 200, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(
        JobView.of(job).model_dump(mode="json"), status_code=status, headers=_headers(job) | (headers or {})
    )
