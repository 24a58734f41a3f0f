"""What a route may use, and on whose behalf: the open record and stores, and the owner of the request.

The owner is decided here and nowhere else. Embedded mode on loopback needs no key: everything belongs to ``local``.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.local import LocalStore

LOCAL_OWNER = "local"


@dataclass(frozen=True)
class Backend:
    """Opened once per process; ``stopping`` is set when the server begins to shut down, so that long answers end."""

    settings: Settings
    store: JobStore
    objects: LocalStore
    stopping: asyncio.Event = field(default_factory=asyncio.Event)


def backend(request: Request) -> Backend:
    """The backend of the application that serves ``request``."""
    found = request.app.state.backend
    assert isinstance(found, Backend)
    return found


def current_owner() -> str:
    """Whose data this request sees."""
    return LOCAL_OWNER


TheBackend = Annotated[Backend, Depends(backend)]
Owner = Annotated[str, Depends(current_owner)]
