"""``python -m services.api``: the HTTP server of one process, with settings from the environment.

In a cluster it refuses to start on a record that is older than it needs; servers that do not answer yet are waited for
(``/readyz`` says so). Ends cleanly on SIGTERM or SIGINT: new connections are refused, event streams and long polls are
told to end, running requests get ten seconds.
"""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cffa_core import logs, tracing
from cffa_core.errors import CffaError, RecordOutdated, StorageUnavailable
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings, read_settings
from cffa_core.storage.open import open_s3
from services.api.app import create_app

GRACE_SECONDS = 10
_log = logging.getLogger("cffa.api")


class Server(uvicorn.Server):
    """uvicorn's server, which tells open streams to end as soon as it is asked to stop.

    What is there once it has started (modules, routes, schemas: about a million objects) stays to the end, and the
    garbage collector is told so: without that every full collection looks through all of it, and all requests wait.
    """

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if (backend := getattr(self._app.state, "backend", None)) is not None:
            backend.stopping.set()
        super().handle_exit(sig, frame)


def require_set_up(settings: Settings) -> None:
    """Raise :class:`RecordOutdated` if a cluster's record is older than this code needs, and
    :class:`InvalidSettings` for an object store's address that is none."""
    if settings.mode != "cluster":
        return
    open_s3(settings).close()
    store = JobStore(settings.record_url)
    try:
        store.require_schema()
    except RecordOutdated:
        raise
    except StorageUnavailable as error:
        _log.warning("the record does not answer yet: %s", error.message)
    finally:
        store.close()


def main() -> int:
    """Serve until told to stop; 0 after a clean end, 2 if the settings or an old record forbid a start."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        settings = read_settings()
        logs.configure(settings)
        tracing.configure(settings, "cffa-api")
        app = create_app(settings)
        require_set_up(settings)
    except CffaError as error:
        _log.error("%s", error.message)
        for problem in error.problems:
            _log.error("%s: %s", problem.pointer, problem.message)
        return 2
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    # uvicorn raises the signal again when it has ended; by then there is nothing left to interrupt.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    server = Server(config, app)
    server.run()
    tracing.shut_down()
    return 0 if server.started else 3


if __name__ == "__main__":
    sys.exit(main())
