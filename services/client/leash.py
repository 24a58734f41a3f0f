"""Run a module as a child that cannot outlive its starter: ``python -m services.client.leash services.worker``.

Standard input is the leash: the starter holds the other end of the pipe and never writes to it. When the starter is
gone, however it went, reading ends, the child gets its ordinary SIGTERM, and is ended for good after a grace period.
What the module does is its own business; nothing here knows it.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

GRACE_SECONDS = 10.0


def _watch(descriptor: int, main_thread: int) -> None:
    while os.read(descriptor, 4096):
        pass
    signal.pthread_kill(main_thread, signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(1)


def main() -> None:
    """Run the module named by the first argument, with the rest as its arguments, on the leash."""
    module, *arguments = sys.argv[1:]
    # The pipe moves away from descriptor 0, so that whatever the module starts does not inherit it.
    descriptor = os.dup(0)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_watch, args=(descriptor, threading.main_thread().ident), name="leash", daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
