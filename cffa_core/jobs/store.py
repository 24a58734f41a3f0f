"""The record: every job, unit, lease, event, data set and model, in one SQL database (SQLite or PostgreSQL).

``JobStore`` is the whole public interface. Its parts, a subject each, are in ``dataset_store``, ``owner_store`` and
``unit_store``; what belongs to the service as a whole is here: the queue, its workers, and what falls due with time.
The statements live next door. Nothing knows of HTTP, of worker processes or of the bytes in object storage.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from cffa_core.jobs import catalog, endings, queue, terms
from cffa_core.jobs.dataset_store import DatasetStore
from cffa_core.jobs.owner_store import OwnerStore
from cffa_core.jobs.records import Load, QueueCounts, WorkerRecord
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.unit_store import UnitStore


class JobStore(DatasetStore, OwnerStore, UnitStore):
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

    # --- queue and workers ----------------------------------------------------------------------------------------

    def queue_summary(self) -> dict[Kind, QueueCounts]:
        """How much waits and runs, for every kind of job."""
        return queue.counts_by_kind(self.load())

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

    # --- what falls due -------------------------------------------------------------------------------------------

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
