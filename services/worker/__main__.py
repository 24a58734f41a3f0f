"""``python -m services.worker``: one worker, until SIGTERM or Ctrl-C; it gives its unit back and ends with 0."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from types import FrameType

from cffa_core.settings import Settings
from services.worker.loop import Worker


def run(worker: Worker) -> int:
    """Run ``worker`` until the process is asked to end; returns the exit code."""

    def stop(number: int, frame: FrameType | None) -> None:
        # On a thread of its own: the handler may have interrupted code that holds the very lock stop() needs.
        threading.Thread(target=worker.stop, name="stop").start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    worker.run()
    return 0


def main() -> int:
    """Run a worker with the settings of the environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return run(Worker(Settings()))


if __name__ == "__main__":
    sys.exit(main())
