"""The Celery application of the workers and its two tasks: one wakes the worker, one proves that it can be woken.

Neither does any work itself: units are claimed from the record by ``services.worker.loop``. Importing this reads no
settings and opens no connection.
"""

from __future__ import annotations

from collections.abc import Callable

from celery import Celery
from kombu import Exchange, Queue

from cffa_core.errors import InvalidSettings
from cffa_core.jobs.delivery import APP, TASK, broker_settings, queue_of
from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings

PROBE = "cffa.probe"
SOFT_SHUTDOWN_SECONDS = 15.0
_NO_EXCHANGE = Exchange("")
_NO_WORKER = "a bare Celery worker cannot do CFFA's work; start `python -m services.worker` instead"


def make_app(
    settings: Settings,
    *,
    on_work: Callable[[Kind], None] | None = None,
    on_probe: Callable[[str], None] | None = None,
) -> Celery:
    """The application; without the two callbacks it can publish, inspect and monitor, but not work.

    ``on_work`` gets the kind of a message and returns when the worker has nothing left to do or was stopped;
    ``on_probe`` gets a probe's token.
    """

    def work(kind: str, job_id: str = "") -> None:
        if on_work is None:
            raise InvalidSettings(_NO_WORKER)
        on_work(Kind(kind))

    def probe(token: str) -> None:
        if on_probe is None:
            raise InvalidSettings(_NO_WORKER)
        on_probe(token)

    app = Celery(APP)
    app.conf.update(
        broker_settings(settings),
        task_queues=[plain_queue(queue_of(kind)) for kind in Kind],
        task_default_queue=queue_of(Kind.GENERATION),
        worker_pool="threads",
        worker_concurrency=1,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_enable_prefetch_count_reduction=False,
        # Concerns tasks that are acknowledged late, of which there are none; unset, Celery warns at every reconnect.
        worker_cancel_long_running_tasks_on_connection_loss=True,
        worker_soft_shutdown_timeout=SOFT_SHUTDOWN_SECONDS,
        worker_send_task_events=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        broker_connection_retry=True,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
    )
    app.task(name=TASK, shared=False)(work)
    app.task(name=PROBE, shared=False)(probe)
    return app


def plain_queue(name: str, expires: float | None = None) -> Queue:
    """A queue that is reached by its name alone, so that it leaves no routing entry behind; ``expires`` in seconds."""
    return Queue(name, _NO_EXCHANGE, routing_key=name, expires=expires)
