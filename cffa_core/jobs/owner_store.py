"""What an owner does with jobs, and what an owner may read of them.

The statements are in ``lifecycle``, ``wishes`` and ``listing``. What a worker does to the same jobs is in
``unit_store``.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from cffa_core.jobs import lifecycle, listing, rows, wishes
from cffa_core.jobs.open_record import OpenRecord
from cffa_core.jobs.records import (
    ANY_JOB,
    USUAL_TERMS,
    Checkpoint,
    Event,
    Footprint,
    Job,
    JobFilter,
    Page,
    Part,
    Terms,
    Wish,
)
from cffa_core.jobs.spec import JobSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.people import quotas


class OwnerStore(OpenRecord):
    """An owner's jobs, a part of :class:`cffa_core.jobs.store.JobStore`; raises as that says."""

    def create_job(
        self,
        owner: str,
        spec: JobSpec,
        *,
        priority: int = 0,
        idempotency_key: str | None = None,
        asked: Terms = USUAL_TERMS,
    ) -> tuple[Job, bool]:
        """Create a job with its units; returns it and whether it is new.

        A larger ``priority`` goes first among the owner's jobs. The same ``idempotency_key`` with the same body
        replays the job it made; with another body it raises :class:`Conflict` whose problem has the code
        ``idempotency_key_reused``. A data set or model that the owner does not have raises :class:`InvalidSpec` with
        the pointer ``/dataset_id`` or ``/model_id``, and so does a deadline that has passed (``/deadline_at``).
        ``asked`` are the terms the owner asked for.
        """
        job_id = rows.new_id("job")  # one for all tries, by which the first of them is known

        def create(connection: sa.Connection) -> tuple[str, bool]:
            return lifecycle.create(
                connection,
                owner,
                job_id,
                spec,
                priority,
                idempotency_key,
                self._limits,
                asked=asked,
                service_retention=self._retention,
            )

        try:
            made, created = self._db.write(create)
        except IntegrityError:  # the same key was written by another process just now
            made, created = self._db.write(create)
        return self.get_job(owner, made), created

    def get_job(self, owner: str, job_id: str) -> Job:
        """One job of this owner, with progress, counts and queue position as of now."""
        return self._db.read(lambda connection: listing.get_job(connection, owner, job_id, self._cap))

    def list_jobs(
        self,
        owner: str,
        kind: Kind | None = None,
        state: JobState | None = None,
        page_size: int = 50,
        page_token: str | None = None,
        *,
        within: JobFilter = ANY_JOB,
    ) -> Page[Job]:
        """Jobs of this owner, newest first, of those that ``within`` keeps; a bad token raises :class:`InvalidSpec`."""
        return self._db.read(
            lambda connection: listing.list_jobs(
                connection, owner, kind, state, page_size, page_token, self._cap, within
            )
        )

    def cancel_job(self, owner: str, job_id: str) -> Job:
        """Ask a job to stop: ``canceled`` at once if nothing works on it, else ``canceling`` until the workers have
        stopped. Repeating it is harmless; a job that succeeded, failed or expired raises :class:`Conflict`."""
        self._db.write(lambda connection: lifecycle.cancel(connection, owner, job_id))
        return self.get_job(owner, job_id)

    def pause_job(self, owner: str, job_id: str) -> Job:
        """Hold a queued or running job (``paused``, or ``pausing`` until its workers have stopped).

        Repeating it is harmless; any other state raises :class:`Conflict`.
        """
        self._db.write(lambda connection: lifecycle.pause(connection, owner, job_id))
        return self.get_job(owner, job_id)

    def resume_job(self, owner: str, job_id: str) -> Job:
        """Let a paused job go on; harmless on a queued or running one, else raises :class:`Conflict`."""
        self._db.write(lambda connection: lifecycle.resume(connection, owner, job_id))
        return self.get_job(owner, job_id)

    def retry_job(self, owner: str, job_id: str) -> Job:
        """Queue the unfinished units of a failed or canceled job again; finished parts and checkpoints are kept.

        It then has no deadline. Raises :class:`Expired` for a job whose products were removed, :class:`Conflict` in
        any other state.
        """

        def retry(connection: sa.Connection) -> None:
            quotas.require_room(connection, owner, self._limits)
            lifecycle.retry(connection, owner, job_id)

        self._db.write(retry)
        return self.get_job(owner, job_id)

    def ask(self, owner: str, job_id: str, wish: Wish) -> Job:
        """Ask a running training for a checkpoint, or a sample, of its next step; asking again before it is done
        changes nothing. Raises :class:`Conflict` for any other job."""
        self._db.write(lambda connection: wishes.ask(connection, owner, job_id, wish))
        return self.get_job(owner, job_id)

    def delete_job(self, owner: str, job_id: str) -> tuple[str, ...]:
        """Remove a terminal job with its history and return the storage keys that are now to be deleted.

        The model of a training job stays, with its files. Raises :class:`Conflict` unless the job is terminal and
        no worker holds one of its units any more.
        """
        return self._db.write(
            lambda connection: lifecycle.delete(connection, owner, job_id),
            landed=lambda connection, _: lifecycle.deleted(connection, job_id),
        )

    def events(self, owner: str, job_id: str, after_seq: int = 0, limit: int = 100) -> list[Event]:
        """History of a job after ``after_seq``, oldest first."""
        return self._db.read(lambda connection: listing.events(connection, owner, job_id, after_seq, limit))

    def metrics(
        self, owner: str, job_id: str, key: str | None = None, since_step: int | None = None
    ) -> list[tuple[int, dict[str, float]]]:
        """Recorded metrics as (step, values) in step order, from ``since_step`` (inclusive) on."""
        return self._db.read(lambda connection: listing.metrics(connection, owner, job_id, key, since_step))

    def parts(
        self, owner: str, job_id: str, *, kind: UnitKind | None = None, first: int = 0, limit: int | None = None
    ) -> list[Part]:
        """Finished units of a job, ordered by kind (work first, finalize last) and index.

        ``kind`` keeps one kind, ``first`` skips smaller indices, ``limit`` caps the number of parts.
        """
        return self._db.read(lambda connection: listing.parts(connection, owner, job_id, kind, first, limit))

    def checkpoints(self, owner: str, job_id: str) -> list[Checkpoint]:
        """Recorded checkpoints of a job, oldest step first (the newest three are kept)."""
        return self._db.read(lambda connection: listing.checkpoints(connection, owner, job_id))

    def footprint(self, job_id: str) -> Footprint:
        """What the record knows of a job's objects, for the removal of orphans; any owner's, deleted jobs too."""
        return self._db.read(lambda connection: listing.footprint(connection, job_id))
