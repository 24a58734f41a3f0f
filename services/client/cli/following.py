"""Following a job to its end on the command line, and how that end is said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cffa_core.errors import CffaError
from services.client.cli.terminal import print_json, progress_bars, say

if TYPE_CHECKING:
    from services.client.client import CffaClient
    from services.client.resources import Job


class JobFailed(CffaError):
    """A watched job ended without success."""

    code = "job_failed"


def follow(client: CffaClient, job_id: str) -> Job:
    """Say the states and draw the progress of a job until it is terminal; returns it."""
    state = None
    with progress_bars() as bars:
        for job in client.watch(job_id):
            if job.state != state:
                state = job.state
                place = f", place {job.queue_position} in the queue" if job.queue_position else ""
                say(f"{job.id}: {state}{place}")
            progress = job.progress
            if progress.total:
                bars(f"{job.kind}: {progress.stage}", progress.current, progress.total)
    return job


def finished(job: Job, *, as_json: bool) -> None:
    """Say how a job ended; raises :class:`JobFailed` if it did not succeed."""
    if as_json:
        print_json(job.model_dump(mode="json"))
    if job.state != "succeeded":
        why = (job.error or {}).get("message") or job.reason or "no reason given"
        raise JobFailed(f"{job.id} is {job.state}: {why}")
