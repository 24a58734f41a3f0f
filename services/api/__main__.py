"""``python -m services.api``: the HTTP server of one process, with settings from the environment.

Ends cleanly on SIGTERM or SIGINT: new connections are refused, event streams and long polls are told to end, running
requests get ten seconds.
"""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cffa_core.errors import CffaError
from cffa_core.settings import Settings
from services.api.app import create_app

GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """uvicorn's server, which tells open streams to end as soon as it is asked to stop."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if (backend := getattr(self._app.state, "backend", None)) is not None:
            backend.stopping.set()
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve until told to stop; 0 after a clean end, 2 if the settings forbid a start."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = Settings()
    try:
        app = create_app(settings)
    except CffaError as error:
        logging.getLogger("cffa.api").error("%s", error.message)
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
    return 0 if server.started else 3


if __name__ == "__main__":
    sys.exit(main())
