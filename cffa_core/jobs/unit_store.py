"""What a worker does with units: take one, keep it, write down what came of it, end the claim.

The statements are in ``claims``, ``results`` and ``endings``. Freeing what dead workers left is in ``store``, since any
process may do it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

from cffa_core.errors import LeaseLost
from cffa_core.jobs import claims, endings, listing, results, wishes
from cffa_core.jobs.open_record import OpenRecord
from cffa_core.jobs.records import Claim, Job, NewModel, Order, Progress, StoredFiles, Wish
from cffa_core.jobs.spec import Kind


class UnitStore(OpenRecord):
    """Units and claims, a part of :class:`cffa_core.jobs.store.JobStore`; raises as that says."""

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
