"""What the two ends of the queue agree on: names, the broker's settings, and how many messages a queue should hold.

A message only wakes a worker; what is worked on is claimed from the record, so a lost message costs a little time and
a double one an empty claim. Nothing here talks to a broker: the API and the workers each do that with their own client.
"""

from __future__ import annotations

from typing import Any

from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings

TASK = "cffa.work"
"""Name of the only task that the API publishes; its arguments are the kind and, as a hint for people, a job id."""

APP = "cffa"
MESSAGES_PER_WORKER = 2
CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0
HEALTH_SECONDS = 10


def queue_of(kind: Kind) -> str:
    """Name of the queue of one kind of job."""
    return kind.value


def shortfall(*, waiting: int, workers: int, queued: int) -> int:
    """How many messages to publish so that a queue wakes enough workers without piling up.

    ``waiting`` units want to be claimed, ``workers`` live workers take this kind, ``queued`` messages are in the queue
    already. Afterwards the queue holds at most one message per waiting unit and two per worker (unless it held more).
    """
    return max(0, min(waiting, MESSAGES_PER_WORKER * workers) - queued)


def broker_settings(settings: Settings) -> dict[str, Any]:
    """Celery settings that producers and workers share: JSON and nothing else, no results, no endless waiting."""
    return {
        "broker_url": settings.queue_url,
        "accept_content": ["json"],
        "task_serializer": "json",
        "result_serializer": "json",
        "event_serializer": "json",
        "task_ignore_result": True,
        "task_store_errors_even_if_ignored": False,
        "task_acks_late": False,
        "enable_utc": True,
        "broker_connection_timeout": CONNECT_SECONDS,
        "broker_transport_options": {
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_timeout": ANSWER_SECONDS,
            "socket_keepalive": True,
            "health_check_interval": HEALTH_SECONDS,
        },
    }
