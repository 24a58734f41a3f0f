"""The record: every job, unit, lease, event, data set and model, in one SQL database (SQLite or PostgreSQL).

This module is the whole public interface; the statements live next door (``lifecycle``, ``claims``, ``results``,
``endings``, ``listing``, ``catalog``). It knows nothing of HTTP, of worker processes or of the bytes in object storage.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from cffa_core.errors import LeaseLost
from cffa_core.jobs import (
    catalog,
    claims,
    dataset_rows,
    endings,
    inputs,
    lifecycle,
    listing,
    queue,
    results,
    rows,
    schema,
    terms,
    upload_rows,
    version,
    wishes,
)
from cffa_core.jobs.database import Database
from cffa_core.jobs.records import (
    ANY_JOB,
    USUAL_TERMS,
    Checkpoint,
    Claim,
    Dataset,
    Event,
    Footprint,
    Job,
    JobFilter,
    Load,
    Model,
    NewModel,
    Order,
    Page,
    Part,
    Progress,
    QueueCounts,
    StoredFiles,
    Terms,
    Wish,
    WorkerRecord,
)
from cffa_core.jobs.spec import JobSpec, Kind
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.upload_rows import AnnouncedFile, Upload
from cffa_core.people import quotas
from cffa_core.people.quotas import Limits
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.manifest import stored_to_json


class JobStore:
    """All reads and writes of the record; safe to share between threads, one per process.

    ``max_crashes`` child crashes in a row without progress, or ``max_expiries`` lost workers, fail a unit and its job.
    At most ``owner_running_units`` units of one owner run at a time (0: any number). Products of new jobs that do not
    say otherwise are kept for ``retention_seconds`` (0: for ever). ``application`` is the name under which PostgreSQL
    lists the connections.
    ``limits`` are what an owner may have whose account says nothing else: more raises :class:`QuotaExceeded`.

    What the database lost is repeated here, a bounded number of times (docs/record.md); whatever still raises
    :class:`StorageUnavailable` may be repeated by the caller.
    Every method that takes an ``owner`` raises :class:`NotFound` for another owner's ids. Methods that take a
    :class:`Claim` raise :class:`LeaseLost` when the claim is no longer the unit's live one.
    """

    def __init__(
        self,
        url: str,
        *,
        max_crashes: int = 3,
        max_expiries: int = 10,
        owner_running_units: int = 0,
        retention_seconds: float = 0.0,
        limits: Limits | None = None,
        application: str = "cffa",
    ) -> None:
        self._db = Database(url, application=application)
        self._limits = limits or Limits()
        self._max_crashes = max_crashes
        self._max_expiries = max_expiries
        self._cap = owner_running_units
        self._retention = retention_seconds

    def migrate(self) -> None:
        """Bring the schema to its newest version; safe when several processes start at the same moment."""
        self._db.migrate()

    def ping(self) -> None:
        """Ask the database one question; raises :class:`StorageUnavailable` when it does not answer."""
        self._db.read(lambda connection: connection.scalar(sa.select(schema.jobs.c.id).limit(1)))

    def require_schema(self) -> None:
        """Raise :class:`RecordOutdated` if the schema is older than this code needs; a newer one is fine."""
        self._db.read(version.require_schema)

    def close(self) -> None:
        """Give back all connections."""
        self._db.close()

    @property
    def database(self) -> Database:
        """The record's transactions, for tables that belong to no job: people, web hooks."""
        return self._db

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
        parent_id: str | None = None,
        split: dict[str, list[str]] | None = None,
    ) -> Dataset:
        """Make a data set visible whose files are already stored; raises :class:`Conflict` if the id is taken.

        The id is a new one (:meth:`new_id`) or one that was derived from an idempotency key. A version of ``parent_id``
        may name the parent's files; :class:`NotFound` if the parent is gone by now.
        """

        def add(connection: sa.Connection) -> Dataset:
            return catalog.add_dataset(
                connection,
                owner,
                dataset_id=dataset_id,
                name=name,
                digest=digest,
                pairs=pairs,
                report=report,
                stored=stored,
                parent_id=parent_id,
                split=split,
            )

        return self._db.write(
            lambda connection: quotas.within_bytes(connection, owner, self._limits, lambda: add(connection)),
            landed=catalog.holds_dataset,
        )

    def require_bytes(self, owner: str, more: int) -> None:
        """Raise :class:`QuotaExceeded` if the owner may not store ``more`` bytes: asked before they are sent."""
        self._db.read(lambda connection: quotas.require_bytes(connection, owner, more, self._limits))

    def delete_dataset(self, owner: str, dataset_id: str) -> tuple[str, ...]:
        """Remove a data set and return the storage keys that are now to be deleted: those no other version names.

        Raises :class:`Conflict` while a job that is not over names it.
        """
        return self._db.write(
            lambda connection: dataset_rows.delete(connection, owner, dataset_id),
            landed=lambda connection, _: dataset_rows.deleted(connection, dataset_id),
        )

    def unsurveyed_datasets(self) -> list[Dataset]:
        """The oldest data sets, of any owner, whose report says that their pairs were not looked at yet."""
        return self._db.read(dataset_rows.unsurveyed)

    def add_survey(
        self, owner: str, dataset_id: str, survey: dict[str, Any], pictures: dict[str, ObjectInfo] | None = None
    ) -> bool:
        """Add to a data set's report what was found in its pairs, with the stored pictures that show it.

        False, and nothing is changed, if another process was faster.
        """
        shown = stored_to_json(StoredFiles(pictures or {}))
        return self._db.write(
            lambda connection: dataset_rows.add_to_report(connection, owner, dataset_id, survey, shown)
        )

    def get_dataset(self, owner: str, dataset_id: str) -> Dataset:
        """One data set of this owner."""
        return self._db.read(lambda connection: catalog.get_dataset(connection, owner, dataset_id))

    def list_datasets(self, owner: str, page_size: int = 50, page_token: str | None = None) -> Page[Dataset]:
        """Data sets of this owner, newest first; a bad token raises :class:`InvalidSpec`."""
        return self._db.read(lambda connection: catalog.list_datasets(connection, owner, page_size, page_token))

    def get_model(self, owner: str, model_id: str) -> Model:
        """One model of this owner."""
        return self._db.read(lambda connection: catalog.get_model(connection, owner, model_id))

    def list_models(
        self, owner: str, *, job_id: str | None = None, page_size: int = 50, page_token: str | None = None
    ) -> Page[Model]:
        """Models of this owner, newest first; ``job_id`` keeps those that one training job made."""
        return self._db.read(lambda connection: catalog.list_models(connection, owner, job_id, page_size, page_token))

    # --- uploads in progress --------------------------------------------------------------------------------------

    def add_upload(
        self,
        owner: str,
        upload_id: str,
        name: str,
        files: Sequence[AnnouncedFile],
        options: dict[str, Any],
        *,
        seconds: float,
    ) -> Upload:
        """Write an upload down that stays open for ``seconds``; the one that has this id already, if there is one."""

        def add(connection: sa.Connection) -> Upload:
            return upload_rows.add(connection, owner, upload_id, name, files, options, seconds)

        return self._db.write(
            lambda connection: quotas.within_bytes(
                connection, owner, self._limits, lambda: add(connection), coming=True
            )
        )

    def get_upload(self, owner: str, upload_id: str) -> Upload:
        """One upload of this owner."""
        return self._db.read(lambda connection: upload_rows.get(connection, owner, upload_id))

    def list_uploads(self, owner: str, page_size: int = 50, page_token: str | None = None) -> Page[Upload]:
        """Uploads of this owner that are not removed yet, newest first."""
        return self._db.read(lambda connection: upload_rows.page(connection, owner, page_size, page_token))

    def hold_upload(self, owner: str, upload_id: str, *, seconds: float) -> Upload:
        """Keep an upload from expiring within ``seconds``: it is about to be checked."""
        return self._db.write(lambda connection: upload_rows.hold(connection, owner, upload_id, seconds))

    def finish_upload(self, owner: str, upload_id: str, dataset_id: str) -> None:
        """Note that an upload has become a data set; its own objects may be deleted then."""
        self._db.write(lambda connection: upload_rows.finish(connection, owner, upload_id, dataset_id))

    def remove_upload(self, owner: str, upload_id: str) -> Upload:
        """Give an upload up and return it; raises :class:`Conflict` if it has become a data set."""
        upload = self.get_upload(owner, upload_id)
        return self._db.write(
            lambda connection: upload_rows.remove(connection, owner, upload_id),
            landed=lambda connection, _: not upload_rows.is_open(connection, upload.id),
        )

    def expired_uploads(self) -> list[Upload]:
        """Some uploads, of any owner, whose time is over; :meth:`forget_upload` once their objects are gone."""
        return self._db.read(upload_rows.expired)

    def forget_upload(self, upload_id: str) -> None:
        """Strike out an upload that expired."""
        self._db.write(lambda connection: upload_rows.forget(connection, upload_id))

    def upload_is_open(self, upload_id: str) -> bool:
        """Whether files of this upload, of whichever owner, may still arrive."""
        return self._db.read(lambda connection: upload_rows.is_open(connection, upload_id))

    def novelty_file(self, owner: str, model_id: str) -> ObjectInfo | None:
        """Thumbnails of the pairs that a model was trained on; None if its training left none or is gone."""
        return self._db.read(lambda connection: inputs.novelty_file(connection, owner, model_id))

    # --- what an owner does with jobs -----------------------------------------------------------------------------

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

    # --- queue and workers ----------------------------------------------------------------------------------------

    def queue_summary(self) -> dict[Kind, QueueCounts]:
        """How much waits and runs, for every kind of job."""
        return self._db.read(queue.queue_summary)

    def load(self) -> Load:
        """Jobs and units by kind and state, the longest wait, live workers: one cheap read, for metrics."""
        return self._db.read(queue.load)

    def take_turn(self, name: str, every: float) -> bool:
        """Whether the caller is the one process that does ``name`` now: True once per ``every`` seconds.

        The interval is measured by the database's clock from the last turn that anybody took; the first is free.
        """
        taken = self._db.write(
            lambda connection: catalog.take_turn(connection, name, every),
            landed=lambda connection, at: at is not None and catalog.turn_taken_at(connection, name) == at,
        )
        return taken is not None

    def register_worker(self, worker_id: str, info: dict[str, Any]) -> None:
        """Write a worker down (or again, after a restart); ``info`` is free: host, kinds, device, versions."""
        self._db.write(lambda connection: catalog.register_worker(connection, worker_id, info))

    def heartbeat(self, worker_id: str) -> None:
        """Note that a worker is alive; an unknown worker raises :class:`NotFound`."""
        self._db.write(lambda connection: catalog.heartbeat(connection, worker_id))

    def remove_worker(self, worker_id: str) -> None:
        """Strike a worker that ends cleanly off the list; its claims are not touched."""
        self._db.write(lambda connection: catalog.remove_worker(connection, worker_id))

    def list_workers(self, seen_within: float | None = None) -> list[WorkerRecord]:
        """Workers, optionally only those seen within so many seconds."""
        return self._db.read(lambda connection: catalog.list_workers(connection, seen_within))

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

        The owner who was served least recently comes first (one who has ``owner_running_units`` units running is left
        out), then the higher priority, then ``prefer_job`` (whose model the worker has loaded), then the older job.
        ``numerics`` is the beginning of this worker's numerics keys: work of jobs pinned to keys that begin otherwise
        is left to others (finalize units are anybody's).
        ``avoid`` names jobs that this worker found it cannot run. Jobs with a newer spec version are left alone.
        """
        asking = claims.Asking(
            worker_id=worker_id,
            kinds=tuple(sorted(kind.value for kind in kinds)),
            lease_seconds=lease_seconds,
            prefer_job=prefer_job,
            numerics=numerics,
            avoid=tuple(sorted(avoid)),
            cap=self._cap,
        )
        # First owners whom no other worker is being served from right now; then, if there were some, wait for those.
        for wait in (False, True):
            passed = False
            for owner, turn in self._db.read(lambda connection: claims.in_turn(connection, asking)):
                taken = self._take(asking, owner, None if wait else turn)
                if isinstance(taken, Claim):
                    return taken
                passed = passed or taken == "passed"
            if not passed:
                break
        return None

    def too_new(self, kinds: Collection[Kind]) -> tuple[int, int] | None:
        """Jobs of these kinds that wait and that this version of the code is too old for: how many, and the newest
        spec version among them. None where there are none; :meth:`claim` leaves them to newer workers."""
        return self._db.read(lambda connection: claims.too_new(connection, sorted(kind.value for kind in kinds)))

    def _take(self, asking: claims.Asking, owner: str, turn: int | None) -> Claim | Literal["nothing", "passed"]:
        return self._db.write(lambda connection: claims.take(connection, asking, owner, turn))

    def pin_numerics(self, claim: Claim, key: str) -> None:
        """Bind the claim's job to a numerics key before the first result.

        The first claim binds; another key raises :class:`NumericsMismatch` (release the claim, then claim with
        ``avoid``). A job that has neither results nor another live claim may be bound anew, unless it regenerates a
        pair of another job.
        """
        self._db.write(lambda connection: claims.pin_numerics(connection, claim, key))

    def renew(self, claim: Claim, lease_seconds: float, progress: Progress | None = None) -> Order:
        """Extend the lease by the database's clock and say what the job's owner wants.

        ``continue``, ``cancel``, ``pause``, or ``wish``: go on, and look at :meth:`wishes`. A lease that ran out is
        still renewed as long as nobody took the unit.
        """
        return self._db.write(lambda connection: claims.renew(connection, claim, lease_seconds, progress))

    def wishes(self, claim: Claim) -> dict[Wish, float]:
        """What the job's owner asked for and has not got, with the time it was asked: a wish that comes again after it
        was fulfilled has another time. :meth:`add_checkpoint` strikes off what it fulfils."""
        return self._db.read(lambda connection: wishes.pending(connection, claim))

    def add_metrics(self, claim: Claim, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step; a repeated step replaces what an older attempt wrote."""
        self._db.write(lambda connection: results.add_metrics(connection, claim, step, values))

    def add_checkpoint(self, claim: Claim, step: int, stored: StoredFiles) -> tuple[str, ...]:
        """Make a published checkpoint the one to resume from; counts as progress.

        Returns the storage keys of checkpoints that this one superseded; the caller may delete them.
        """
        return self._db.write(lambda connection: results.add_checkpoint(connection, claim, step, stored))

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
        Repeated with the same files it answers as the first time and changes nothing. The place in the queue is left
        out of the job returned.
        """
        taken = self._db.write(lambda connection: results.commit(connection, claim, stored, info, job_result, model))
        if not taken:
            raise LeaseLost(f"job {claim.job_id} takes no more results")
        return self._db.read(lambda connection: listing.get_job(connection, claim.owner, claim.job_id, None))

    def release(self, claim: Claim, *, reason: str | None = None) -> None:
        """Give a unit back without penalty: clean shutdown, cancel or pause obeyed.

        ``reason`` is shown with the job while it waits, e.g. that this worker cannot do it.
        """
        self._db.write(lambda connection: endings.release(connection, claim, reason))

    def crashed(self, claim: Claim, reason: str, *, made_progress: bool, detail: str | None = None) -> bool:
        """Count a crash of the child; returns whether the unit will be tried again.

        ``made_progress`` means something durable since the last crash. Ten (``max_expiries``) crashes between two
        checkpoints end the unit whatever was reported: a unit that always dies at the same step must not run forever.
        ``detail``, e.g. a traceback, goes to the job's history alone.
        """
        return self._db.write(
            lambda connection: endings.crashed(
                connection, claim, reason, made_progress, self._max_crashes, self._max_expiries, detail
            )
        )

    def fail(self, claim: Claim, code: str, message: str) -> None:
        """End the unit and its job with an error that no retry would cure."""
        self._db.write(lambda connection: endings.fail(connection, claim, code, message))

    def sweep(self) -> int:
        """Free expired leases (reason ``worker_lost``), finish jobs that wait to be canceled or paused, and fail those
        that missed their deadline (code ``deadline_exceeded``).

        Returns how many leases were freed. Any process may call it at any time.
        """
        for job_id in self._db.read(terms.overdue):
            self._db.write(partial(terms.miss_deadline, job_id=job_id))
        return sum(self._expire(job_id) for job_id in self._db.read(endings.expired_jobs))

    def expirable(self) -> list[str]:
        """Jobs whose products are due to be removed now, oldest first, at most a hundred; any owner's."""
        return self._db.read(terms.expirable)

    def expire_job(self, job_id: str) -> tuple[str, ...] | None:
        """Make a job that is due ``expired`` and return the storage keys that are now to be deleted.

        Its history stays, and so does the model of a training. Nothing happens (None) if it is not due, a worker still
        holds one of its units, or an unfinished job names it, e.g. to measure its pairs.
        """
        return self._db.write(partial(terms.expire_job, job_id=job_id))

    def _expire(self, job_id: str) -> int:
        return self._db.write(lambda connection: endings.expire(connection, job_id, self._max_expiries))
