"""``python -m services.api``: the HTTP server of one process, with settings from the environment.

Ends cleanly on SIGTERM or SIGINT: new connections are refused, event streams and long polls are told to end, running
requests get ten seconds.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType

import uvicorn

from cffa_core.errors import CffaError
from cffa_core.settings import Settings
from services.api.app import create_app, require_safe

GRACE_SECONDS = 10


class Server(uvicorn.Server):
    """uvicorn's server, which tells open streams to end as soon as it is asked to stop."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.config.loaded_app.state.stop_streams()
        super().handle_exit(sig, frame)


def main() -> int:
    """Serve until told to stop; 0 after a clean end, 2 if the settings forbid a start."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = Settings()
    try:
        require_safe(settings)
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
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = Server(config)
    server.run()
    return 0 if server.started else 3


if __name__ == "__main__":
    sys.exit(main())
