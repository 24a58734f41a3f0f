"""Wakes workers after a job was committed: messages to the queue of its kind, published by a thread of their own.

A request only leaves a note and never waits for the broker, so a dead one delays nobody. What could not be published
is tried again after a pause; if this process ends first, the workers' own top-up and their polling make up for it.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType
from typing import Any, Self

from cffa_core.errors import CffaError
from cffa_core.jobs.delivery import APP, TASK, broker_settings, queue_of, shortfall
from cffa_core.jobs.records import LIVE_WORKER_SECONDS, Job
from cffa_core.jobs.spec import Kind, PairGrid
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings

PAUSE_SECONDS = 5.0
"""No attempt within this time after one that failed."""

WORKERS_SECONDS = 5.0
CLOSE_SECONDS = 2.0

log = logging.getLogger("cffa.delivery")


class Delivery:
    """The API's end of the queue; where no broker is configured, all of it does nothing. Use as a context manager."""

    def __init__(self, settings: Settings, store: JobStore) -> None:
        self._settings = settings
        self._store = store
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._notes: dict[Kind, tuple[str, int]] = {}
        self._workers: tuple[float, dict[Kind, int]] = (0.0, {})
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True) if settings.queue_url else None

    def announce(self, job: Job) -> None:
        """Note that units of ``job`` wait, after its commit; returns at once and never raises.

        For new, resumed and retried jobs. Notes of one kind that were not delivered yet become one.
        """
        if self._thread is None:
            return
        units = job.spec.parts if isinstance(job.spec, PairGrid) else 1
        with self._lock:
            self._notes[job.kind] = (job.id, units + self._notes.get(job.kind, ("", 0))[1])
        self._wake.set()

    def close(self) -> None:
        """Deliver what is noted, if that takes no more than two seconds, and end."""
        self._closing = True
        self._wake.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- on the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        # Only a cluster needs Celery, which takes its time to import.
        from celery import Celery
        from kombu.exceptions import KombuError
        from redis.exceptions import RedisError

        app = Celery(APP, set_as_current=False)
        app.conf.update(broker_settings(self._settings))
        while True:
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                notes, self._notes = self._notes, {}
            try:
                if notes:
                    self._deliver(app, notes)
            except (KombuError, RedisError, OSError, CffaError) as error:
                log.warning("no worker was woken (they will find the work by themselves): %s", error)
                if self._closing:
                    return
                self._put_back(notes)
                self._pause()
            if self._closing and not self._notes:
                return

    def _deliver(self, app: Any, notes: dict[Kind, tuple[str, int]]) -> None:
        from kombu.exceptions import ChannelError

        # A connection of its own each time: it costs a millisecond, and one that was kept may be long dead.
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, interval_start=0, timeout=1)
            producer = app.amqp.Producer(connection, auto_declare=False)
            for kind, (job_id, units) in list(notes.items()):
                queue = queue_of(kind)
                try:
                    queued = connection.default_channel.queue_declare(queue, passive=True).message_count
                except ChannelError:  # a queue without messages does not exist
                    queued = 0
                # One worker is assumed even if none was seen: it may have started a moment ago.
                workers = max(1, self._live_workers().get(kind, 0))
                for _ in range(shortfall(waiting=units, workers=workers, queued=queued)):
                    app.send_task(TASK, args=(kind.value, job_id), queue=queue, producer=producer, retry=False)
                del notes[kind]

    def _live_workers(self) -> dict[Kind, int]:
        """Workers per kind, as of a few seconds ago."""
        read, workers = self._workers
        if not workers or time.monotonic() - read > WORKERS_SECONDS:
            seen = [
                worker.info.get("kinds", ()) for worker in self._store.list_workers(seen_within=LIVE_WORKER_SECONDS)
            ]
            workers = {kind: sum(kind.value in kinds for kinds in seen) for kind in Kind}
            self._workers = (time.monotonic(), workers)
        return workers

    def _put_back(self, notes: dict[Kind, tuple[str, int]]) -> None:
        with self._lock:
            self._notes = notes | self._notes
        self._wake.set()

    def _pause(self) -> None:
        end = time.monotonic() + PAUSE_SECONDS
        while not self._closing and time.monotonic() < end:
            time.sleep(0.1)
