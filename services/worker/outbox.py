"""A worker's own way to the broker: how full the queues are, messages into them, and probes to itself.

One connection, kept while it works and dropped after any error; used by one thread. Errors of the broker are raised
as they are (:data:`BROKER_ERRORS`).
"""

from __future__ import annotations

import contextlib
from typing import Any

from celery import Celery
from kombu.exceptions import ChannelError, KombuError
from redis.exceptions import RedisError

from cffa_core.jobs.delivery import TASK, queue_of
from cffa_core.jobs.spec import Kind
from services.worker.tasks import PROBE

BROKER_ERRORS = (KombuError, RedisError, OSError)
PROBE_EXPIRES_SECONDS = 60.0


class Outbox:
    """Publishes for one worker, whose private queue is ``private``. Close it when done."""

    def __init__(self, app: Celery, private: str) -> None:
        self._app = app
        self._private = private
        self._connection: Any = None

    def queued(self, kind: Kind) -> int:
        """Messages that wait in the queue of a kind."""
        with self._connected() as connection:
            try:
                return int(connection.default_channel.queue_declare(queue_of(kind), passive=True).message_count)
            except ChannelError:  # to Redis, a queue without messages does not exist
                return 0

    def wake(self, kind: Kind, times: int) -> None:
        """Publish ``times`` messages of a kind, for whoever takes them."""
        for _ in range(times):
            self._send(TASK, (kind.value,), queue_of(kind))

    def probe(self, token: str) -> None:
        """Publish a message to this worker's private queue."""
        self._send(PROBE, (token,), self._private, expires=PROBE_EXPIRES_SECONDS)

    def close(self) -> None:
        """Give the connection back."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.release()

    def _send(self, task: str, args: tuple[str, ...], queue: str, **options: float) -> None:
        with self._connected() as connection:
            producer = self._app.amqp.Producer(connection, auto_declare=False)
            self._app.send_task(task, args=args, queue=queue, producer=producer, retry=False, **options)

    @contextlib.contextmanager
    def _connected(self) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        try:
            yield self._connection
        except BROKER_ERRORS:
            with contextlib.suppress(*BROKER_ERRORS):
                self.close()
            self._connection = None
            raise
