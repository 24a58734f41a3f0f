"""Celery's worker, on a thread: it consumes the queues, answers ``celery inspect`` and sends the events Flower shows.

Signals, logging and the work itself belong to others. The thread starts Celery's worker again should it ever end by
itself; while the broker is away, Celery tries to reconnect for as long as it takes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery
from celery.app.trace import setup_worker_optimizations
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Queue
from kombu.asynchronous import set_event_loop

RESTART_SECONDS = 5.0
LONGEST_RECONNECT_SECONDS = 5.0

log = logging.getLogger("cffa.worker")


class _Consumer(Consumer):  # type: ignore[misc]  # Celery carries no types
    """Celery's consumer, which would wait up to 30 s before it looks for its broker again."""

    def ensure_connected(self, conn: Any) -> Any:
        def say(error: BaseException, interval: float) -> None:
            log.warning("the broker is away (%s); next attempt in %g s", error, interval)

        conn.ensure_connection(
            say,
            interval_start=1,
            interval_step=1,
            interval_max=LONGEST_RECONNECT_SECONDS,
            callback=state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn


class Listener:
    """Consumes ``queues`` under the Celery name ``hostname``. One per process: Celery's state is global.

    ``on_shutdown`` is called when somebody ended the worker through Celery's remote control.
    """

    def __init__(self, app: Celery, hostname: str, queues: Sequence[Queue], on_shutdown: Callable[[], None]) -> None:
        self._app = app
        self._hostname = hostname
        self._queues = queues
        self._on_shutdown = on_shutdown
        self._stopping = threading.Event()
        self._closing = threading.Event()
        self._controller: Any = None
        self._thread = threading.Thread(target=self._run, name="celery", daemon=True)

    def start(self) -> None:
        """Begin to listen, or to look for the broker."""
        self._thread.start()

    @property
    def closing(self) -> bool:
        """Whether Celery's worker is about to end and only waits for its task."""
        return self._closing.is_set()

    def revive(self) -> bool:
        """Drop the broker connection and make a new one; False if there is none, so that one is being made already."""
        consumer = getattr(self._controller, "consumer", None)
        if consumer is None or consumer.connection is None or consumer.hub is None:
            return False
        consumer.hub.call_soon(self._lose_connection)
        return True

    def stop(self, seconds: float) -> bool:
        """Take no more messages and wait for Celery's worker to end; False if that took longer than ``seconds``.

        On the listener's own thread it does not wait.
        """
        self._stopping.set()
        state.should_stop = 0
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        setup_worker_optimizations(self._app, self._hostname)
        for queue in self._queues:
            self._app.amqp.queues.add(queue)
        while not self._stopping.is_set():
            set_event_loop(None)
            self._closing.clear()
            self._controller = self._app.WorkController(
                hostname=self._hostname,
                queues=[queue.name for queue in self._queues],
                consumer_cls=_Consumer,
                without_mingle=True,
                without_gossip=True,
            )
            self._controller.blueprint.on_close = self._on_close
            self._controller.start()  # returns when it was stopped or broke down
            if self._stopping.is_set():
                return
            if self._controller.exitcode == 0:
                log.info("ended by remote control")
                self._on_shutdown()
                return
            log.error("the Celery worker ended by itself; it is started again in %g s", RESTART_SECONDS)
            self._stopping.wait(RESTART_SECONDS)

    def _on_close(self) -> None:
        self._closing.set()
        self._controller.on_close()

    def _lose_connection(self) -> None:
        """On Celery's own thread, whose loop answers a connection error with a new connection."""
        if not self._stopping.is_set():
            raise ConnectionResetError("nothing was received although the broker answers")
