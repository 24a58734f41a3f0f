"""``python -m services.worker [--kinds training,generation]``: one worker, until SIGTERM or Ctrl-C.

It gives its unit back and ends with 0. In cluster mode the worker also listens to the broker.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Protocol

from cffa_core import logs, tracing
from cffa_core.errors import CffaError, InvalidSettings
from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings, read_settings
from services.worker.loop import Worker
from services.worker.metrics import WorkerMetrics
from services.worker.supervisor import CHILD_COMMAND


class Runnable(Protocol):
    """What :func:`run` runs."""

    def run(self) -> int:
        """Work until stopped; returns the exit code."""

    def stop(self) -> None:
        """End soon; may be repeated."""


def run(worker: Runnable) -> int:
    """Run ``worker`` until the process is asked to end; returns the exit code."""

    def stop(number: int, frame: FrameType | None) -> None:
        # On a thread of its own: the handler may have interrupted code that holds the very lock stop() needs.
        threading.Thread(target=worker.stop, name="stop").start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    try:
        return worker.run()
    finally:
        # Python gives handlers back before it ends; a second signal at that moment must not look like a crash.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def worker_for(
    settings: Settings,
    *,
    kinds: str = "",
    child_command: Sequence[str] = CHILD_COMMAND,
    metrics: WorkerMetrics | None = None,
) -> Runnable:
    """The worker that these settings ask for; ``kinds`` (comma separated) wins over ``settings.worker_kinds``."""
    chosen = parse_kinds(kinds or settings.worker_kinds)
    if settings.mode == "embedded":
        return Worker(settings, kinds=chosen, child_command=child_command, metrics=metrics)
    from services.worker.cluster import ClusterWorker  # only a cluster needs Celery

    return ClusterWorker(settings, kinds=chosen, child_command=child_command, metrics=metrics)


def parse_kinds(text: str) -> tuple[Kind, ...]:
    """Kinds of jobs from a comma-separated list; an empty one means all. :class:`InvalidSettings` for other names."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {kind.value: kind for kind in Kind}
    if unknown := [name for name in names if name not in known]:
        raise InvalidSettings(f"no kind of job is called {', '.join(unknown)}; there are {', '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names)) or tuple(Kind)


def main() -> int:
    """Run a worker with the settings of the environment."""
    parser = argparse.ArgumentParser(prog="python -m services.worker", description="One CFFA worker.")
    parser.add_argument("--kinds", default="", help="kinds of jobs to take, comma separated (default: all)")
    arguments = parser.parse_args()
    metrics = WorkerMetrics()
    try:
        settings = read_settings()
        logs.configure(settings)
        tracing.configure(settings, "cffa-worker")
        with metrics.served(settings.host, settings.metrics_port):
            return run(worker_for(settings, kinds=arguments.kinds, metrics=metrics))
    except CffaError as error:
        for line in (f"{error.code}: {error.message}", *(f"{item.pointer}: {item.message}" for item in error.problems)):
            logging.getLogger("cffa.worker").critical(line)
        return 1
    finally:
        tracing.shut_down()


if __name__ == "__main__":
    sys.exit(main())
