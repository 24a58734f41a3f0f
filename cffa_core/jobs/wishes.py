"""What the owner of a running training may ask for at any time: a checkpoint now, a sample now.

A wish is written into the job's row, told to the worker with the next renewal of its lease, and struck off by the
checkpoint that fulfils it, in the same transaction. A job that leaves ``running`` for good before says so in its
history (``LockedJob.move``). Each function takes the caller's open transaction.
"""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.errors import Conflict
from cffa_core.jobs.locked import LockedJob
from cffa_core.jobs.records import Claim, StoredFiles, Wish
from cffa_core.jobs.schema import jobs
from cffa_core.jobs.spec import TRAININGS, Kind
from cffa_core.jobs.state import JobState

SAMPLE = "sample/"
"""Where a checkpoint holds the pairs that were drawn because of a wish."""


def ask(connection: sa.Connection, owner: str, job_id: str, wish: Wish) -> None:
    """See :meth:`JobStore.ask`."""
    job = LockedJob.take(connection, job_id, owner)
    kind = Kind(job.row.kind)
    if kind not in TRAININGS:
        raise Conflict(f"job {job_id} is a {kind} job; only a training makes checkpoints and samples")
    if wish == "sample" and kind is not Kind.TRAINING:
        raise Conflict(f"job {job_id} is a {kind} job, which draws no samples; post a captioned job with its model")
    if job.state is not JobState.RUNNING:
        raise Conflict(f"job {job_id} is {job.state.value}; a {wish} can be asked of a running training")
    pending = dict(job.row.wishes or {})
    if wish in pending:
        return
    job.set(wishes={**pending, wish: job.now})
    job.note("asked", wish=wish)
    job.save()


def pending(connection: sa.Connection, held: Claim) -> dict[Wish, float]:
    """See :meth:`JobStore.wishes`."""
    found: dict[Wish, float] | None = connection.scalar(sa.select(jobs.c.wishes).where(jobs.c.id == held.job_id))
    return found or {}


def fulfil(job: LockedJob, stored: StoredFiles) -> list[Wish]:
    """Strike off what a checkpoint with these files fulfils; returns it. The caller saves the job."""
    made: list[Wish] = ["checkpoint"]
    if any(name.startswith(SAMPLE) for name in stored.files):
        made.append("sample")
    left = {wish: at for wish, at in (job.row.wishes or {}).items() if wish not in made}
    done = [wish for wish in made if wish in (job.row.wishes or {})]
    if done:
        job.set(wishes=left or None)
    return done
