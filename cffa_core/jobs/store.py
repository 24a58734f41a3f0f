"""The record: every job, unit, lease, event, data set and model, in one SQL database (SQLite or PostgreSQL).

This module is the whole public interface; the statements live next door (``lifecycle``, ``claims``, ``results``,
``endings``, ``listing``, ``catalog``). It knows nothing of HTTP, of worker processes or of the bytes in object storage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from cffa_core.errors import LeaseLost
from cffa_core.jobs import catalog, claims, endings, lifecycle, listing, results, rows, schema, version
from cffa_core.jobs.database import Database
from cffa_core.jobs.records import (
    Checkpoint,
    Claim,
    Dataset,
    Event,
    Footprint,
    Job,
    Model,
    NewModel,
    Order,
    Page,
    Part,
    Progress,
    QueueCounts,
    StoredFiles,
    WorkerRecord,
)
from cffa_core.jobs.spec import JobSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind


class JobStore:
    """All reads and writes of the record; safe to share between threads, one per process.

    ``max_crashes`` child crashes in a row without progress, or ``max_expiries`` lost workers, fail a unit and its job.
    Every method that takes an ``owner`` raises :class:`NotFound` for another owner's ids. Methods that take a
    :class:`Claim` raise :class:`LeaseLost` when the claim is no longer the unit's live one.
    """

    def __init__(self, url: str, *, max_crashes: int = 3, max_expiries: int = 10) -> None:
        self._db = Database(url)
        self._max_crashes = max_crashes
        self._max_expiries = max_expiries

    def migrate(self) -> None:
        """Bring the schema to its newest version; safe when several processes start at the same moment."""
        self._db.migrate()

    def ping(self) -> None:
        """Ask the database one question; raises :class:`StorageUnavailable` when it does not answer."""
        with self._db.read() as connection:
            connection.execute(sa.select(sa.func.count()).select_from(schema.jobs))

    def require_schema(self) -> None:
        """Raise :class:`RecordOutdated` if the schema is older than this code needs; a newer one is fine."""
        with self._db.read() as connection:
            version.require_schema(connection)

    def close(self) -> None:
        """Give back all connections."""
        self._db.close()

    # --- data sets and models -------------------------------------------------------------------------------------

    @staticmethod
    def new_id(prefix: str) -> str:
        """Mint an id, e.g. ``ds_`` + 20 characters of ``[0-9a-z]``; prefixes are ds, job, mdl, unit."""
        return rows.new_id(prefix)

    def add_dataset(
        self,
        owner: str,
        *,
        dataset_id: str,
        name: str,
        digest: str,
        pairs: int,
        report: dict[str, Any],
        stored: StoredFiles,
    ) -> Dataset:
        """Make a data set visible whose files are already stored; raises :class:`Conflict` if the id is taken.

        The id is a new one (:meth:`new_id`) or one that was derived from an idempotency key.
        """
        with self._db.write() as connection:
            return catalog.add_dataset(
                connection,
                owner,
                dataset_id=dataset_id,
                name=name,
                digest=digest,
                pairs=pairs,
                report=report,
                stored=stored,
            )

    def get_dataset(self, owner: str, dataset_id: str) -> Dataset:
        """One data set of this owner."""
        with self._db.read() as connection:
            return catalog.get_dataset(connection, owner, dataset_id)

    def list_datasets(self, owner: str, page_size: int = 50, page_token: str | None = None) -> Page[Dataset]:
        """Data sets of this owner, newest first; a bad token raises :class:`InvalidSpec`."""
        with self._db.read() as connection:
            return catalog.list_datasets(connection, owner, page_size, page_token)

    def get_model(self, owner: str, model_id: str) -> Model:
        """One model of this owner."""
        with self._db.read() as connection:
            return catalog.get_model(connection, owner, model_id)

    def list_models(
        self, owner: str, *, job_id: str | None = None, page_size: int = 50, page_token: str | None = None
    ) -> Page[Model]:
        """Models of this owner, newest first; ``job_id`` keeps those that one training job made."""
        with self._db.read() as connection:
            return catalog.list_models(connection, owner, job_id, page_size, page_token)

    # --- what an owner does with jobs -----------------------------------------------------------------------------

    def create_job(
        self, owner: str, spec: JobSpec, *, priority: int = 0, idempotency_key: str | None = None
    ) -> tuple[Job, bool]:
        """Create a job with its units; returns it and whether it is new.

        A larger ``priority`` goes first among the owner's jobs. The same ``idempotency_key`` with the same body
        replays the job it made; with another body it raises :class:`Conflict` whose problem has the code
        ``idempotency_key_reused``. A data set or model that the owner does not have raises :class:`InvalidSpec` with
        the pointer ``/dataset_id`` or ``/model_id``.
        """
        try:
            with self._db.write() as connection:
                job_id, created = lifecycle.create(connection, owner, spec, priority, idempotency_key)
        except IntegrityError:  # the same key, or the owner's first job, was written by another process just now
            with self._db.write() as connection:
                job_id, created = lifecycle.create(connection, owner, spec, priority, idempotency_key)
        return self.get_job(owner, job_id), created

    def get_job(self, owner: str, job_id: str) -> Job:
        """One job of this owner, with progress, counts and queue position as of now."""
        with self._db.read() as connection:
            return listing.get_job(connection, owner, job_id)

    def list_jobs(
        self,
        owner: str,
        kind: Kind | None = None,
        state: JobState | None = None,
        page_size: int = 50,
        page_token: str | None = None,
    ) -> Page[Job]:
        """Jobs of this owner, newest first; a bad token raises :class:`InvalidSpec`."""
        with self._db.read() as connection:
            return listing.list_jobs(connection, owner, kind, state, page_size, page_token)

    def cancel_job(self, owner: str, job_id: str) -> Job:
        """Ask a job to stop: ``canceled`` at once if nothing works on it, else ``canceling`` until the workers have
        stopped. Repeating it is harmless; a job that succeeded, failed or expired raises :class:`Conflict`."""
        with self._db.write() as connection:
            lifecycle.cancel(connection, owner, job_id)
        return self.get_job(owner, job_id)

    def pause_job(self, owner: str, job_id: str) -> Job:
        """Hold a queued or running job (``paused``, or ``pausing`` until its workers have stopped).

        Repeating it is harmless; any other state raises :class:`Conflict`.
        """
        with self._db.write() as connection:
            lifecycle.pause(connection, owner, job_id)
        return self.get_job(owner, job_id)

    def resume_job(self, owner: str, job_id: str) -> Job:
        """Let a paused job go on; harmless on a queued or running one, else raises :class:`Conflict`."""
        with self._db.write() as connection:
            lifecycle.resume(connection, owner, job_id)
        return self.get_job(owner, job_id)

    def retry_job(self, owner: str, job_id: str) -> Job:
        """Queue the unfinished units of a failed or canceled job again; finished parts and checkpoints are kept.

        Raises :class:`Conflict` in any other state.
        """
        with self._db.write() as connection:
            lifecycle.retry(connection, owner, job_id)
        return self.get_job(owner, job_id)

    def delete_job(self, owner: str, job_id: str) -> tuple[str, ...]:
        """Remove a terminal job with its history and return the storage keys that are now to be deleted.

        The model of a training job stays, with its files. Raises :class:`Conflict` unless the job is terminal and
        no worker holds one of its units any more.
        """
        with self._db.write() as connection:
            return lifecycle.delete(connection, owner, job_id)

    def events(self, owner: str, job_id: str, after_seq: int = 0, limit: int = 100) -> list[Event]:
        """History of a job after ``after_seq``, oldest first."""
        with self._db.read() as connection:
            return listing.events(connection, owner, job_id, after_seq, limit)

    def metrics(
        self, owner: str, job_id: str, key: str | None = None, since_step: int | None = None
    ) -> list[tuple[int, dict[str, float]]]:
        """Recorded metrics as (step, values) in step order, from ``since_step`` (inclusive) on."""
        with self._db.read() as connection:
            return listing.metrics(connection, owner, job_id, key, since_step)

    def parts(
        self, owner: str, job_id: str, *, kind: UnitKind | None = None, first: int = 0, limit: int | None = None
    ) -> list[Part]:
        """Finished units of a job, ordered by kind (work first, finalize last) and index.

        ``kind`` keeps one kind, ``first`` skips smaller indices, ``limit`` caps the number of parts.
        """
        with self._db.read() as connection:
            return listing.parts(connection, owner, job_id, kind, first, limit)

    def checkpoints(self, owner: str, job_id: str) -> list[Checkpoint]:
        """Recorded checkpoints of a job, oldest step first (the newest three are kept)."""
        with self._db.read() as connection:
            return listing.checkpoints(connection, owner, job_id)

    def footprint(self, job_id: str) -> Footprint:
        """What the record knows of a job's objects, for the removal of orphans; any owner's, deleted jobs too."""
        with self._db.read() as connection:
            return listing.footprint(connection, job_id)

    # --- queue and workers ----------------------------------------------------------------------------------------

    def queue_summary(self) -> dict[Kind, QueueCounts]:
        """How much waits and runs, for every kind of job."""
        with self._db.read() as connection:
            return listing.queue_summary(connection)

    def register_worker(self, worker_id: str, info: dict[str, Any]) -> None:
        """Write a worker down (or again, after a restart); ``info`` is free: host, kinds, device, versions."""
        with self._db.write() as connection:
            catalog.register_worker(connection, worker_id, info)

    def heartbeat(self, worker_id: str) -> None:
        """Note that a worker is alive; an unknown worker raises :class:`NotFound`."""
        with self._db.write() as connection:
            catalog.heartbeat(connection, worker_id)

    def remove_worker(self, worker_id: str) -> None:
        """Strike a worker that ends cleanly off the list; its claims are not touched."""
        with self._db.write() as connection:
            catalog.remove_worker(connection, worker_id)

    def list_workers(self, seen_within: float | None = None) -> list[WorkerRecord]:
        """Workers, optionally only those seen within so many seconds."""
        with self._db.read() as connection:
            return catalog.list_workers(connection, seen_within)

    # --- what a worker does with units ----------------------------------------------------------------------------

    def claim(
        self,
        worker_id: str,
        kinds: Collection[Kind],
        *,
        lease_seconds: float,
        prefer_job: str | None = None,
        numerics: str | None = None,
        avoid: Collection[str] = (),
    ) -> Claim | None:
        """Take the next unit, or None when nothing waits.

        The owner who was served least recently comes first, then the higher priority, then ``prefer_job`` (whose
        model the worker has loaded), then the older job. ``numerics`` is the beginning of this worker's numerics
        keys: work of jobs pinned to keys that begin otherwise is left to others (finalize units are anybody's).
        ``avoid`` names jobs that this worker found it cannot run.
        """
        with self._db.write() as connection:
            return claims.claim(connection, worker_id, kinds, lease_seconds, prefer_job, numerics, avoid)

    def pin_numerics(self, claim: Claim, key: str) -> None:
        """Bind the claim's job to a numerics key before the first result.

        The first claim binds; another key raises :class:`NumericsMismatch` (release the claim, then claim with
        ``avoid``). A job that has neither results nor another live claim may be bound anew.
        """
        with self._db.write() as connection:
            claims.pin_numerics(connection, claim, key)

    def renew(self, claim: Claim, lease_seconds: float, progress: Progress | None = None) -> Order:
        """Extend the lease by the database's clock and say what the job's owner wants.

        ``continue``, ``cancel`` or ``pause``. A lease that ran out is still renewed as long as nobody took the unit.
        """
        with self._db.write() as connection:
            return claims.renew(connection, claim, lease_seconds, progress)

    def add_metrics(self, claim: Claim, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step; a repeated step replaces what an older attempt wrote."""
        with self._db.write() as connection:
            results.add_metrics(connection, claim, step, values)

    def add_checkpoint(self, claim: Claim, step: int, stored: StoredFiles) -> tuple[str, ...]:
        """Make a published checkpoint the one to resume from; counts as progress.

        Returns the storage keys of checkpoints that this one superseded; the caller may delete them.
        """
        with self._db.write() as connection:
            return results.add_checkpoint(connection, claim, step, stored)

    def commit(
        self,
        claim: Claim,
        stored: StoredFiles,
        info: dict[str, Any],
        *,
        job_result: dict[str, Any] | None = None,
        model: NewModel | None = None,
    ) -> Job:
        """Finish a unit: point the record to its published files and free the claim, all or nothing.

        When no unit is left, ``finalize`` is enqueued in the same transaction. The commit of the finalize unit
        writes ``job_result`` (and ``model_id``, where ``model`` is given) and the job has succeeded. In a job that
        is being cancelled or is over, the unit is freed and :class:`LeaseLost` is raised: nothing is left to do.
        """
        with self._db.write() as connection:
            taken = results.commit(connection, claim, stored, info, job_result, model)
        if not taken:
            raise LeaseLost(f"job {claim.job_id} takes no more results")
        return self.get_job(claim.owner, claim.job_id)

    def release(self, claim: Claim, *, reason: str | None = None) -> None:
        """Give a unit back without penalty: clean shutdown, cancel or pause obeyed.

        ``reason`` is shown with the job while it waits, e.g. that this worker cannot do it.
        """
        with self._db.write() as connection:
            endings.release(connection, claim, reason)

    def crashed(self, claim: Claim, reason: str, *, made_progress: bool, detail: str | None = None) -> bool:
        """Count a crash of the child; returns whether the unit will be tried again.

        ``made_progress`` means something durable since the last crash. Ten (``max_expiries``) crashes between two
        checkpoints end the unit whatever was reported: a unit that always dies at the same step must not run forever.
        ``detail``, e.g. a traceback, goes to the job's history alone.
        """
        with self._db.write() as connection:
            return endings.crashed(
                connection, claim, reason, made_progress, self._max_crashes, self._max_expiries, detail
            )

    def fail(self, claim: Claim, code: str, message: str) -> None:
        """End the unit and its job with an error that no retry would cure."""
        with self._db.write() as connection:
            endings.fail(connection, claim, code, message)

    def sweep(self) -> int:
        """Free expired leases (reason ``worker_lost``) and finish jobs that wait to be canceled or paused.

        Returns how many leases were freed. Any process may call it at any time.
        """
        with self._db.read() as connection:
            found = endings.expired_jobs(connection)
        freed = 0
        for job_id in found:
            with self._db.write() as connection:
                freed += endings.expire(connection, job_id, self._max_expiries)
        return freed
