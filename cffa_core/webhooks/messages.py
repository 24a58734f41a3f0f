"""What is announced to web hooks, and the words of it: event types and message bodies.

A body says what happened to which job or data set, with counts and a path to ask for more: never a specification, a
name that a user gave, or a message of an error, since receivers may be anywhere. Parts of a job are not announced: a
job of 10,000 parts is one message when it starts and one when it ends.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from cffa_core.jobs.records import Counts
from cffa_core.jobs.state import JobState


class EventType(StrEnum):
    """What a web hook can be told."""

    JOB_STARTED = "job.started"
    JOB_PAUSED = "job.paused"
    JOB_SUCCEEDED = "job.succeeded"
    JOB_FAILED = "job.failed"
    JOB_CANCELED = "job.canceled"
    JOB_EXPIRED = "job.expired"
    DATASET_CREATED = "dataset.created"


TEST = "webhook.test"
"""Sent when its owner asks for it, whatever the hook wants to hear."""

OF_STATE = {
    JobState.RUNNING: EventType.JOB_STARTED,
    JobState.PAUSED: EventType.JOB_PAUSED,
    JobState.SUCCEEDED: EventType.JOB_SUCCEEDED,
    JobState.FAILED: EventType.JOB_FAILED,
    JobState.CANCELED: EventType.JOB_CANCELED,
    JobState.EXPIRED: EventType.JOB_EXPIRED,
}
"""States of a job that are announced when it enters them."""


def job_body(event_type: EventType, state: JobState, at: float, job: Any, counts: Counts) -> str:
    """Body of a message on a job; ``job`` is its row, ``at`` when it entered ``state`` (seconds since 1970)."""
    error_code = (job.error or {}).get("code") if state is JobState.FAILED else None
    data = {
        "id": job.id,
        "kind": job.kind,
        "state": state.value,
        "counts": asdict(counts),
        "error_code": error_code,
        "links": {"self": f"/v1/jobs/{job.id}"},
    }
    return body(event_type, at, data)


def dataset_body(at: float, dataset_id: str, pairs: int) -> str:
    """Body of the message on a new data set."""
    data = {"id": dataset_id, "pairs": pairs, "links": {"self": f"/v1/datasets/{dataset_id}"}}
    return body(EventType.DATASET_CREATED, at, data)


def trial_body(at: float, webhook_id: str) -> str:
    """Body of a message that only shows that the way is open."""
    return body(TEST, at, {"id": webhook_id, "links": {"self": f"/v1/webhooks/{webhook_id}"}})


def body(event_type: str, at: float, data: dict[str, Any]) -> str:
    """A message as the standard shapes it; these very bytes are signed and sent."""
    moment = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({"type": str(event_type), "timestamp": moment, "data": data}, separators=(",", ":"))
