"""What is said of a job's products that are not there: not yet, not ever, or not any more."""

from __future__ import annotations

from cffa_core.errors import Conflict, Expired, NotFound
from cffa_core.jobs.records import Job
from cffa_core.jobs.state import TERMINAL, JobState


def not_made(job: Job, what: str) -> Conflict | NotFound:
    """The error for a product that is not there: yet, or for good."""
    if job.state in TERMINAL:
        return NotFound(f"{what} was not made: the job is {job.state}")
    return Conflict(f"{what} is not made yet: the job is {job.state}")


def refuse_expired(job: Job) -> None:
    """Raise ``Expired`` if the job's products were removed."""
    if job.state is JobState.EXPIRED:
        raise Expired(f"the products of job {job.id} were removed by retention")
