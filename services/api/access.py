"""What a route may use, and on whose behalf: the open record and stores, and the owner of the request.

Who that is decided the gate before (``keys``), by the key that the request carries. Embedded mode on loopback needs
none: everything belongs to ``local``.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Annotated

import anyio
from fastapi import Depends, Header, Request
from pydantic import AfterValidator

from cffa_core.errors import NotFound
from cffa_core.jobs.store import JobStore
from cffa_core.people.accounts import Accounts
from cffa_core.people.audit import AuditLog
from cffa_core.people.keys import Caller
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore
from cffa_core.webhooks.store import Webhooks
from services.api.delivery import Delivery
from services.api.problems import Unauthorized
from services.api.watching import Watches

CHECKS_AT_ONCE = 2


@dataclass(frozen=True)
class Backend:
    """Opened once per process. ``delivery`` wakes workers; it does nothing where they poll.

    ``checks`` bounds how many uploads are checked at a time: that is heavy, and the other routes need their threads.
    ``stopping`` is set when the server begins to shut down, so that long answers end; ``unsurveyed`` when a data set
    was made that is to be looked into. ``watches`` are the jobs that requests wait for.
    """

    settings: Settings
    store: JobStore
    objects: ObjectStore
    delivery: Delivery
    accounts: Accounts
    audit: AuditLog
    hooks: Webhooks
    checks: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(CHECKS_AT_ONCE))
    stopping: threading.Event = field(default_factory=threading.Event)
    unsurveyed: threading.Event = field(default_factory=threading.Event)
    watches: Watches = field(default_factory=Watches)


def backend(request: Request) -> Backend:
    """The backend of the application that serves ``request``."""
    found = request.app.state.backend
    assert isinstance(found, Backend)
    return found


def current_caller(request: Request) -> Caller:
    """Who this request speaks for: the gate has found out."""
    caller = request.scope.get("state", {}).get("caller")
    if not isinstance(caller, Caller):
        raise Unauthorized("this request was let in without a key")
    return caller


def current_owner(request: Request) -> str:
    """Whose data this request sees."""
    return current_caller(request).owner


def _id(prefix: str, what: str) -> AfterValidator:
    """Only what could be an id reaches the record; anything else names nothing, so it is 404 and not 422."""
    form = re.compile(rf"{prefix}_[0-9a-z]{{20}}")

    def checked(value: str) -> str:
        if form.fullmatch(value) is None:
            raise NotFound(f"no {what} has this id")
        return value

    return AfterValidator(checked)


JobId = Annotated[str, _id("job", "job")]
DatasetId = Annotated[str, _id("ds", "data set")]
UploadId = Annotated[str, _id("up", "upload")]
ModelId = Annotated[str, _id("mdl", "model")]
WebhookId = Annotated[str, _id("wh", "web hook")]
DeliveryId = Annotated[str, _id("dlv", "delivery")]
KeyId = Annotated[str, _id("key", "key")]
TheBackend = Annotated[Backend, Depends(backend)]
Owner = Annotated[str, Depends(current_owner)]
TheCaller = Annotated[Caller, Depends(current_caller)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=200,
        pattern=r"^[\x21-\x7e]+$",
        description="Posting again with the same key and body answers as the first post did.",
    ),
]
