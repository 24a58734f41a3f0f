"""Puts the API together: backend, routers, errors, request log, sweeper. Logic lives in the routers.

``create_app`` opens nothing; the application's lifespan opens the record and the object store, migrates the record,
and runs the sweeper that frees expired leases.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import time
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from cffa_core.errors import CffaError, InvalidSettings
from cffa_core.jobs import sweep
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.open import open_local
from services.api import archives, blobs, datasets, documentation, events, health, jobs, models, pairs, problems, web
from services.api.access import Backend
from services.api.request_log import RequestLog

TAGS = [
    {"name": "data sets", "description": "Checked pairs of real images, the input of training."},
    {"name": "jobs", "description": "Training and generation: post, watch, cancel, pause, resume, retry, delete."},
    {"name": "results", "description": "What jobs made: pairs, archives, checkpoints, metrics."},
    {"name": "models", "description": "Products of training jobs, the input of generation."},
    {"name": "blobs", "description": "Signed, expiring links to stored bytes; they need no other permission."},
    {"name": "service", "description": "Queue, workers and health."},
]
DESCRIPTION = """
Grows a small set of registered pairs of colour fundus photographs (CF) and fluorescein angiographies (FA) into a
large one. Upload pairs, post a training job, post a generation job for N pairs, poll, download archives.

Every error is an RFC 9457 problem with a stable `code`, all findings in `errors`, and the `request_id` of the log line.
"""
ORPHANS_SECONDS = 3600.0
_log = logging.getLogger("cffa.api")


def require_safe(settings: Settings) -> None:
    """Raise :class:`InvalidSettings` if this API must not start as asked: it has no keys yet."""
    if settings.mode == "cluster":
        raise InvalidSettings(
            "cluster mode needs API keys, which this version does not have yet; use CFFA_MODE=embedded"
        )
    if not settings.allow_remote and not _is_loopback(settings.host):
        raise InvalidSettings(
            f"the embedded API has no keys, so it listens on loopback only, not on {settings.host!r}; set "
            "CFFA_HOST=127.0.0.1, or CFFA_ALLOW_REMOTE=true if everyone who can reach this machine may use it"
        )


def create_app(settings: Settings) -> FastAPI:
    """The application for ``settings``; raises :class:`InvalidSettings` if it must not run."""
    require_safe(settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend = await run_in_threadpool(_open, settings)
        app.state.backend = backend
        sweeper = asyncio.create_task(_sweep(backend))
        try:
            yield
        finally:
            backend.stopping.set()
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper
            await run_in_threadpool(backend.store.close)

    app = FastAPI(
        title="CFFA",
        version="1",
        summary="New registered pairs of colour fundus photographs and fluorescein angiographies",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        openapi_url="/openapi.json",
        docs_url=None,  # the bundled viewers load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    problems.install(app)
    documentation.install(app)
    for part in (health, datasets, jobs, events, pairs, archives, models, blobs, web):
        app.include_router(part.router)
    app.add_middleware(RequestLog, hosts=_hosts(settings))
    return app


def _open(settings: Settings) -> Backend:
    settings.home.mkdir(parents=True, exist_ok=True)
    settings.scratch_dir.mkdir(parents=True, exist_ok=True)
    store = JobStore(settings.record_url, max_crashes=settings.max_crashes, max_expiries=settings.max_expiries)
    store.migrate()
    datasets.remove_abandoned(settings.scratch_dir)
    return Backend(settings, store, open_local(settings))


async def _sweep(backend: Backend) -> None:
    """Free expired leases every ``sweep_seconds``, and objects that nothing points to every hour.

    A failed round is logged and the next one tries again.
    """
    orphans_due = time.monotonic() + ORPHANS_SECONDS
    while True:
        try:
            await run_in_threadpool(backend.store.sweep)
            if time.monotonic() > orphans_due:
                orphans_due = time.monotonic() + ORPHANS_SECONDS
                await run_in_threadpool(sweep.orphans, backend.store, backend.objects)
        except CffaError:
            _log.exception("the sweep failed; it runs again in %s s", backend.settings.sweep_seconds)
        await asyncio.sleep(backend.settings.sweep_seconds)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(settings: Settings) -> frozenset[str] | None:
    """Names the API answers under; None (any) when it was opened to others, who know it by names we cannot."""
    if settings.allow_remote:
        return None
    known = {"localhost", "127.0.0.1", "::1", settings.host, urlsplit(settings.url).hostname or ""}
    return frozenset(known - {""})
