"""A job's history: events as a JSON page or a live stream, metrics, checkpoints. Read-only."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from starlette.concurrency import run_in_threadpool

from cffa_core.errors import NotFound
from cffa_core.jobs.records import Event
from cffa_core.jobs.state import TERMINAL
from services.api.access import Backend, JobId, Owner, TheBackend
from services.api.missing_products import refuse_expired
from services.api.problems import Answers, documented
from services.api.product_schemas import CheckpointList, CheckpointView, MetricList, MetricPoint
from services.api.schemas import EventList, EventView
from services.api.watching import PAGE

PING_SECONDS = 15.0
EVENT_STREAM = "text/event-stream"
router = APIRouter()
_ANSWERS: Answers = {
    200: {
        "description": "One page; with `Accept: text/event-stream` a stream that ends when the job is finished.",
        "content": {EVENT_STREAM: {"schema": {"type": "string"}}},
    },
    204: {"description": "Stream only: the job is finished and Last-Event-ID was its last event."},
}


@router.get(
    "/v1/jobs/{job_id}/events",
    tags=["jobs"],
    response_model=EventList,
    operation_id="listEvents",
    summary="A job's history, or its live stream",
    responses=_ANSWERS | documented(404, 422, 503),
)
async def list_events(
    request: Request,
    job_id: JobId,
    backend: TheBackend,
    owner: Owner,
    after: Annotated[int, Query(ge=0, le=2**53, description="Only events with a larger `seq`.")] = 0,
    page_size: Annotated[int, Query(ge=1, le=1000)] = PAGE,
    last_event_id: Annotated[str | None, Header(description="Stream only: continue after this event.")] = None,
) -> Response:
    """Events in order. A stream replays everything after Last-Event-ID (or `after`), then follows the job; each message
    has the event's `seq` as id, its type as event name, and the same JSON object as data. After a Last-Event-ID that
    the job does not have, everything is replayed."""
    if EVENT_STREAM not in request.headers.get("accept", ""):
        found = await run_in_threadpool(backend.store.events, owner, job_id, after, page_size + 1)
        page = found[:page_size]
        more = page[-1].seq if len(found) > page_size else None
        body = EventList(items=[EventView.of(event) for event in page], next_after=more)
        return JSONResponse(body.model_dump(mode="json"))
    if last_event_id is not None and last_event_id.isdecimal() and len(last_event_id) < 16:
        after = int(last_event_id)
        if not await run_in_threadpool(backend.store.events, owner, job_id, after - 1, 1):
            after = 0  # an event that this record does not have, e.g. since it was restored: nothing may be missed
    job = await run_in_threadpool(backend.store.get_job, owner, job_id)
    missed = await run_in_threadpool(backend.store.events, owner, job_id, after, 1)
    if job.state in TERMINAL and not missed:
        return Response(status_code=204)  # tells an EventSource not to connect again
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_stream(backend, owner, job_id, after), media_type=EVENT_STREAM, headers=headers)


async def _stream(backend: Backend, owner: str, job_id: str, after: int) -> AsyncIterator[bytes]:
    """Replay from the record, then follow the job together with all who watch it."""
    said = time.monotonic()
    try:
        replayed = PAGE
        while replayed == PAGE and not backend.stopping.is_set():
            missed = await run_in_threadpool(backend.store.events, owner, job_id, after, PAGE)
            for event in missed:
                yield _message(event)
                after = event.seq
            replayed = len(missed)
        with backend.watches.of(backend.store, owner, job_id) as watch:
            while not backend.stopping.is_set():
                watch.follow(after)
                look = await watch.next()
                found = look.after(after)
                whole = found is not None and not look.more
                if found is None:  # what this stream has seen ends before what the watch has kept
                    found = await run_in_threadpool(backend.store.events, owner, job_id, after, PAGE)
                for event in found:
                    yield _message(event)
                    after = event.seq
                if whole and look.job.state in TERMINAL:
                    return
                if found:
                    said = time.monotonic()
                elif time.monotonic() - said > PING_SECONDS:
                    said = time.monotonic()
                    yield KEEPALIVE_COMMENT
    except NotFound:  # deleted while somebody watched
        return


def _message(event: Event) -> bytes:
    return format_sse_event(id=str(event.seq), event=event.type, data_str=EventView.of(event).model_dump_json())


@router.get(
    "/v1/jobs/{job_id}/metrics",
    tags=["results"],
    operation_id="listMetrics",
    summary="Training metrics by step",
    responses=documented(404, 422, 503),
)
def list_metrics(
    job_id: JobId,
    backend: TheBackend,
    owner: Owner,
    key: Annotated[str | None, Query(max_length=200, description="Only this metric, e.g. `eps_cf`.")] = None,
    since_step: Annotated[int, Query(ge=0, le=2**53, description="Only this step and later ones.")] = 0,
) -> MetricList:
    """Scalars in step order."""
    found = backend.store.metrics(owner, job_id, key, since_step)
    return MetricList(
        items=[MetricPoint(step=step, values=values) for step, values in found],
        next_since_step=found[-1][0] + 1 if found else since_step,
    )


@router.get(
    "/v1/jobs/{job_id}/checkpoints",
    tags=["results"],
    operation_id="listCheckpoints",
    summary="Checkpoints of a training job",
    responses=documented(404, 410, 503),
)
def list_checkpoints(job_id: JobId, backend: TheBackend, owner: Owner) -> CheckpointList:
    """Checkpoints a restarted worker can resume from, oldest first; the newest three are kept."""
    refuse_expired(backend.store.get_job(owner, job_id))
    return CheckpointList(items=[CheckpointView.of(item) for item in backend.store.checkpoints(owner, job_id)])
