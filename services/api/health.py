"""Whether the service works, and what it is busy with: liveness, readiness, queue, workers."""

from __future__ import annotations

import logging
import uuid
from datetime import datetime
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from cffa_core.errors import CffaError, Problem, RecordOutdated, StorageUnavailable
from cffa_core.jobs.queue import counts_by_kind
from cffa_core.jobs.records import LIVE_WORKER_SECONDS
from cffa_core.jobs.spec import Kind
from services.api.access import Backend, Owner, TheBackend
from services.api.problems import documented
from services.api.schemas import Live, Ready

router = APIRouter(tags=["service"])
_log = logging.getLogger("cffa.api")


class KindLoad(BaseModel):
    """Load of one kind of job; ``oldest_seconds`` is how long the unit that waits longest has waited."""

    queued_jobs: int
    active_jobs: int
    waiting_units: int
    running_units: int
    oldest_seconds: float


class QueueView(BaseModel):
    """Jobs that wait and run, in all and by kind, and the number of live workers.

    ``owner_running_units`` is how many units of one owner run at a time; null means any number.
    """

    waiting: int
    running: int
    workers: int
    owner_running_units: int | None
    kinds: dict[Kind, KindLoad]


class WorkerView(BaseModel):
    """A worker that was heard of within the last minute."""

    id: str
    info: dict[str, Any]
    started_at: datetime
    seen_at: datetime
    idle_seconds: float


class WorkerList(BaseModel):
    """Live workers."""

    items: list[WorkerView]


@router.get("/livez", operation_id="livez", summary="Does the process answer")
async def livez() -> Live:
    """Says nothing about dependencies: a failing one is no reason to restart the API."""
    return Live()


@router.get("/readyz", operation_id="readyz", summary="Can the service take work", responses=documented(503))
def readyz(backend: TheBackend) -> Ready:
    """Asks the record a question, and writes and removes a small object."""
    problems = [problem for problem in (_record(backend), _storage(backend)) if problem is not None]
    if problems:
        raise StorageUnavailable("the service cannot take work now", problems=tuple(problems))
    return Ready(status="ok", checks={"record": "ok", "storage": "ok"})


def _record(backend: Backend) -> Problem | None:
    try:
        if backend.settings.mode == "cluster":
            backend.store.require_schema()
        backend.store.ping()
    except RecordOutdated as error:
        _log.error("not ready: %s", error.message)
        return Problem("record", error.code, "the record is not set up for this version of the service yet")
    except CffaError as error:
        _log.exception("not ready: the record")
        return Problem("record", error.code, "the record does not answer")
    return None


def _storage(backend: Backend) -> Problem | None:
    key = f"health/{uuid.uuid4().hex}"
    try:
        backend.objects.put_bytes(key, b"ready")
        backend.objects.delete(key)
    except CffaError as error:
        _log.exception("not ready: the object store")
        return Problem("storage", error.code, "the object store does not take a write")
    return None


@router.get("/v1/queue", operation_id="getQueue", summary="What waits and runs", responses=documented(503))
def get_queue(backend: TheBackend, owner: Owner) -> QueueView:
    """Load of the whole service, not only of one owner."""
    load = backend.store.load()
    kinds = {
        kind: KindLoad(
            queued_jobs=counts.queued_jobs,
            active_jobs=counts.active_jobs,
            waiting_units=counts.waiting_units,
            running_units=counts.running_units,
            oldest_seconds=round(load.oldest_seconds.get(kind, 0.0), 1),
        )
        for kind, counts in counts_by_kind(load).items()
    }
    return QueueView(
        waiting=sum(counts.queued_jobs for counts in kinds.values()),
        running=sum(counts.active_jobs for counts in kinds.values()),
        workers=load.workers,
        owner_running_units=backend.settings.owner_running_units or None,
        kinds=kinds,
    )


@router.get("/v1/workers", operation_id="listWorkers", summary="Live workers", responses=documented(503))
def list_workers(backend: TheBackend, owner: Owner) -> WorkerList:
    """Workers heard of within the last minute."""
    return WorkerList(
        items=[
            WorkerView(
                id=worker.id,
                info=worker.info,
                started_at=worker.started_at,
                seen_at=worker.seen_at,
                idle_seconds=worker.idle_seconds,
            )
            for worker in backend.store.list_workers(seen_within=LIVE_WORKER_SECONDS)
        ]
    )
