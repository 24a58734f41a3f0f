"""Puts the API together: backend, routers, keys, errors, request log, sweeper. Logic lives in the routers.

``create_app`` opens nothing; the application's lifespan opens the record and the object store and runs the sweeper
that frees expired leases. Embedded mode migrates its record itself; a cluster's is set up by ``services.api.setup``
before any API starts, and the servers need not answer yet when one does.
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
from cffa_core.jobs import sweep, upload_sweep
from cffa_core.jobs.store import JobStore
from cffa_core.people.accounts import Accounts
from cffa_core.people.audit import AuditLog
from cffa_core.people.keys import key_secret
from cffa_core.people.quotas import Limits
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store
from cffa_core.webhooks.store import Webhooks
from services.api import (
    archives,
    attention_jobs,
    blobs,
    captioned_jobs,
    dataset_versions,
    datasets,
    documentation,
    edit_jobs,
    events,
    folder_uploads,
    gates,
    health,
    jobs,
    keys,
    metrics,
    models,
    pairs,
    people,
    problems,
    reports,
    scratch,
    surveys,
    web,
    webhook_sender,
    webhooks,
    wishes,
)
from services.api.access import Backend
from services.api.delivery import Delivery
from services.api.rate_limits import RateLimits
from services.api.request_log import RequestLog
from services.api.webhook_sender import Sender

TAGS = [
    {"name": "data sets", "description": "Checked pairs of real images, the input of training."},
    {
        "name": "jobs",
        "description": "Training, generation, evaluation: post, watch, cancel, pause, resume, retry, delete.",
    },
    {"name": "results", "description": "What jobs made: pairs, archives, reports, checkpoints, metrics."},
    {"name": "models", "description": "Products of training jobs, the input of generation."},
    {"name": "blobs", "description": "Signed, expiring links to stored bytes; they need no other permission."},
    {"name": "webhooks", "description": "Addresses that are told what happens, signed; what was sent to them."},
    {"name": "people", "description": "Accounts, their keys and limits, and who changed what."},
    {"name": "service", "description": "Queue, workers, health and metrics."},
]
DESCRIPTION = """
Grows a small set of registered pairs of colour fundus photographs (CF) and fluorescein angiographies (FA) into a
large one. Upload pairs, post a training job, post a generation job for N pairs, poll, download archives.

Every error is an RFC 9457 problem with a stable `code`, all findings in `errors`, and the `request_id` of the log line.
"""
OPEN_TEMPLATES = frozenset({"/v1/blobs/{token}"})
ORPHANS_SECONDS = 3600.0
_log = logging.getLogger("cffa.api")


def require_safe(settings: Settings) -> None:
    """Raise :class:`InvalidSettings` if a keyless API would listen to others, or a cluster's lacks its secret."""
    keys.require_secret(settings)
    open_to_all = settings.mode == "embedded" and not settings.require_keys
    if open_to_all and not settings.allow_remote and not _is_loopback(settings.host):
        raise InvalidSettings(
            f"the embedded API has no keys, so it listens on loopback only, not on {settings.host!r}; set "
            "CFFA_HOST=127.0.0.1, or CFFA_REQUIRE_KEYS=true, or CFFA_ALLOW_REMOTE=true if everyone who can reach this "
            "machine may use it"
        )


def create_app(settings: Settings) -> FastAPI:
    """The application for ``settings``; raises :class:`InvalidSettings` if it must not run."""
    require_safe(settings)
    webhook_sender.require_sensible(settings)
    cluster = settings.mode == "cluster"
    keyed = cluster or settings.require_keys

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        backend = await run_in_threadpool(_open, settings)
        app.state.backend = backend
        app.state.rate_limits = RateLimits.of(settings)
        with backend.delivery:
            sender = Sender(backend.hooks, settings, on_ending=app.state.measured.sent)
            works = (_sweep(backend), sender.run(backend.store), surveys.survey_forever(backend))
            tasks = [asyncio.create_task(work) for work in works]
            try:
                yield
            finally:
                backend.stopping.set()
                for task in tasks:
                    task.cancel()
                for task in tasks:
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
        await app.state.rate_limits.close()
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
    documentation.install(app, open_paths=keys.OPEN | OPEN_TEMPLATES, keyed=keyed)
    for part in (
        health,
        metrics,
        datasets,
        folder_uploads,
        dataset_versions,
        jobs,
        attention_jobs,
        edit_jobs,
        captioned_jobs,
        events,
        pairs,
        archives,
        gates,
        reports,
        models,
        wishes,
        people,
        webhooks,
        web,
    ):
        app.include_router(part.router)
    if not cluster:
        app.include_router(blobs.router)  # a cluster's object store serves its links itself
    app.add_middleware(keys.KeyGate, settings=settings)
    app.state.measured = metrics.Measured()
    # With a key in each request, neither its host name nor the page it came from matters.
    app.add_middleware(RequestLog, hosts=_hosts(settings), foreign_pages=keyed, on_answer=app.state.measured.answered)
    return app


def _open(settings: Settings) -> Backend:
    settings.scratch_dir.mkdir(parents=True, exist_ok=True)
    limits = Limits(settings.quota_active_jobs, settings.quota_pairs, settings.quota_bytes)
    store = JobStore(
        settings.record_url,
        max_crashes=settings.max_crashes,
        max_expiries=settings.max_expiries,
        owner_running_units=settings.owner_running_units,
        retention_seconds=settings.retention_days * 86_400,
        limits=limits,
        application="cffa-api",
    )
    if settings.mode == "embedded":
        store.migrate()
    scratch.remove_abandoned(settings.scratch_dir)
    accounts = Accounts(store.database, key_secret(settings), defaults=limits)
    audit = AuditLog(store.database)
    hooks = Webhooks.of(store.database, settings)
    return Backend(settings, store, open_store(settings), Delivery(settings, store), accounts, audit, hooks)


async def _sweep(backend: Backend) -> None:
    """Free expired leases and remove expired products every ``sweep_seconds``, what nothing points to every hour.

    Every API and worker process does so. A failed round is logged and the next one tries again.
    """
    orphans_due = time.monotonic() + ORPHANS_SECONDS
    set_up = backend.settings.mode == "embedded"
    while True:
        try:
            if not set_up:  # this process may be older than the answers of its database
                await run_in_threadpool(backend.store.require_schema)
                set_up = True
            await run_in_threadpool(backend.store.sweep)
            await run_in_threadpool(sweep.expired, backend.store, backend.objects)
            if time.monotonic() > orphans_due:
                orphans_due = time.monotonic() + ORPHANS_SECONDS
                await run_in_threadpool(_remove_what_nobody_needs, backend)
        except CffaError as error:
            _log.error("the sweep failed, it runs again in %s s: %s", backend.settings.sweep_seconds, error.message)
        await asyncio.sleep(backend.settings.sweep_seconds)


def _remove_what_nobody_needs(backend: Backend) -> None:
    """Folders of killed uploads (each process looks after its own scratch), and, in turn, orphaned objects."""
    scratch.remove_abandoned(backend.settings.scratch_dir)
    upload_sweep.remove_expired(backend.store, backend.objects)
    if backend.store.take_turn("audit", ORPHANS_SECONDS / 2):
        backend.audit.forget(backend.settings.audit_days)
    if backend.store.take_turn("keys", ORPHANS_SECONDS / 2):
        backend.accounts.erase_marks()
    if backend.store.take_turn("webhooks", ORPHANS_SECONDS / 2):
        backend.hooks.forget(backend.settings.webhook_keep_days * 86_400)
    if backend.store.take_turn("orphans", ORPHANS_SECONDS / 2):
        sweep.orphans(backend.store, backend.objects)
        upload_sweep.remove_strays(backend.store, backend.objects)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _hosts(settings: Settings) -> frozenset[str] | None:
    """Names the API answers under; None (any) when it was opened to others, who know it by names we cannot."""
    if settings.allow_remote or settings.require_keys or settings.mode == "cluster":
        return None
    known = {"localhost", "127.0.0.1", "::1", settings.host, urlsplit(settings.url).hostname or ""}
    return frozenset(known - {""})
