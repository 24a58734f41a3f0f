"""The worker of a cluster: the claim loop, a Celery worker that wakes it, and a watch that the two hear each other.

Each part works without the others: the loop polls the record, so that a dead broker costs time and no job; the Celery
worker reconnects by itself; and the watch ends the process if neither it nor the broker can be brought back.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence

from cffa_core.jobs.delivery import queue_of
from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings
from services.worker.listener import Listener
from services.worker.loop import Worker
from services.worker.metrics import WorkerMetrics
from services.worker.outbox import BROKER_ERRORS, Outbox
from services.worker.supervisor import CHILD_COMMAND
from services.worker.tasks import SOFT_SHUTDOWN_SECONDS, make_app, plain_queue
from services.worker.topup import top_up
from services.worker.watch import Patience, Watch

EXIT_DEAF = 75
"""Exit code of a worker that its broker no longer reaches (EX_TEMPFAIL): start it again."""

PRIVATE_QUEUE_SECONDS = 300.0
WATCH_SECONDS = 2.0

log = logging.getLogger("cffa.worker")


class ClusterWorker:
    """One worker process of a cluster. :meth:`stop` may be called repeatedly and from any thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        kinds: Collection[Kind] = tuple(Kind),
        child_command: Sequence[str] = CHILD_COMMAND,
        metrics: WorkerMetrics | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._exit_code = 0
        self._worker = Worker(settings, kinds=kinds, child_command=child_command, metrics=metrics)
        hostname = f"cffa@{self._worker.id}"
        self._worker.facts["celery"] = hostname
        private = f"worker.{self._worker.id}"
        app = make_app(settings, on_work=self._on_work, on_probe=lambda _: self._watch.heard())
        queues = [plain_queue(queue_of(kind)) for kind in kinds]
        # The private queue vanishes with its worker, however that ends.
        queues.append(plain_queue(private, expires=PRIVATE_QUEUE_SECONDS))
        self._listener = Listener(app, hostname, queues, self.stop)
        self._relay = Outbox(app, private)
        outbox = Outbox(app, private)
        self._watch = Watch(
            outbox,
            idle=lambda: self._worker.idle,
            revive=self._listener.revive,
            give_up=self._give_up,
            top_up=lambda: top_up(self._worker.store, outbox, every=settings.sweep_seconds),
            top_up_seconds=settings.sweep_seconds,
            patience=patience or Patience(),
        )

    def run(self) -> int:
        """Work until stopped; returns the exit code: 0, or :data:`EXIT_DEAF`."""
        self._listener.start()
        self._watch.start()
        try:
            self._worker.run()
        finally:
            self._watch.stop(WATCH_SECONDS)
            if not self._listener.stop(SOFT_SHUTDOWN_SECONDS):
                log.warning("the Celery worker did not end within %g s; it is left behind", SOFT_SHUTDOWN_SECONDS)
        return self._exit_code

    def stop(self) -> None:
        """Take no more messages, give back the unit in hand at its next safe point, return from :meth:`run`."""
        self._worker.stop()
        self._watch.stop(0)
        self._listener.stop(0)

    def _on_work(self, kind: Kind) -> None:
        """A message arrived (on Celery's one pool thread)."""
        if not self._worker.wakeable:
            # It works already, on something it found by itself: the message may still wake another worker.
            try:
                self._relay.wake(kind, 1)
            except BROKER_ERRORS as error:
                log.info("a message could not be passed on: %s", error)
        self._worker.work_off(leave=lambda: self._listener.closing)

    def _give_up(self) -> None:
        self._exit_code = EXIT_DEAF
        self.stop()
