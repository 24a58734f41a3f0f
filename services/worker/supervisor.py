"""One claimed unit from order to commit: the supervisor talks to the record, its child to the numbers.

The supervisor renews the lease only while the child moves, ends the child when the lease may be lost, passes on what
the job's owner wants, and turns every way a child can end into the right entry in the record. It imports no numeric
library; what a unit computes is none of its business.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cffa_core import tracing
from cffa_core.errors import CffaError, LeaseLost, NumericsMismatch
from cffa_core.jobs.records import Claim, Progress
from cffa_core.jobs.state import COMPUTES_NOTHING
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from services.worker.child_process import ChildProcess
from services.worker.lease_guard import LeaseGuard
from services.worker.live_unit import LiveUnit, Outcome
from services.worker.metrics import WorkerMetrics
from services.worker.orders import order_for
from services.worker.protocol import Answer, Beat, CheckpointSaved, Done, Failed, Ready, Report, Stop, Stopped, Wished
from services.worker.scratch import Scratch

CHILD_COMMAND = (sys.executable, "-m", "services.worker.child")
TICK_SECONDS = 0.1
REPORT_SECONDS = 0.5
RETRY_SECONDS = 0.5
SHUTDOWN_SECONDS = 8.0
UNPREPARED_SECONDS = 1.0
START_SECONDS = 60.0
SAFE_SHARE_OF_LEASE = 0.75
UNAVAILABLE_SECONDS = 30.0
MISMATCH_SECONDS = 60.0

T = TypeVar("T")
log = logging.getLogger("cffa.worker")


class Supervisor:
    """Works on one claim at a time. ``stop()`` may be called from a signal handler or another thread.

    ``on_tick`` is called several times a second while a unit is worked on.
    """

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        scratch: Scratch,
        *,
        threads: int,
        child_command: Sequence[str] = CHILD_COMMAND,
        on_tick: Callable[[], None] = lambda: None,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._scratch = scratch
        self._threads = threads
        self._command = child_command
        self._on_tick = on_tick
        self._metrics = metrics or WorkerMetrics()
        self._child: ChildProcess | None = None
        self._stop = threading.Event()
        self._versions: str | None = None

    @property
    def warm_job(self) -> str | None:
        """The job whose model the child has loaded."""
        return self._child.job_id if self._child is not None and self._child.usable else None

    @property
    def versions(self) -> str | None:
        """The beginning of this worker's numerics keys (device, its model, library versions), once a child told it."""
        return self._versions

    def stop(self) -> None:
        """Leave the unit in hand at its next safe point and give it back."""
        self._stop.set()

    def rest(self) -> None:
        """End the child, if there is one: nothing waits for it."""
        if self._child is not None:
            self._child.close()
            self._child = None
            self._metrics.child_gone()

    def work(self, claim: Claim, claimed: float) -> Outcome:
        """Do one claimed unit, however it ends; never raises for what a unit or the record does.

        ``claimed`` is the monotonic time just before the claim was asked for: the lease is at least that old.
        """
        ids = {"job_id": claim.job_id, "unit": f"{claim.kind} {claim.index}", "attempt": claim.attempt}
        with tracing.span("unit", self._trace_of(claim), **ids) as traced:
            outcome = self._work(claim, claimed)
            traced["outcome"] = outcome.kind
        return outcome

    def _trace_of(self, claim: Claim) -> str | None:
        """The trace of the request that posted the job, if it is known and anybody listens."""
        if not tracing.active():
            return None
        try:
            created = self._store.events(claim.owner, claim.job_id, 0, 1)
        except CffaError:  # the trace of a unit is worth no unit
            return None
        return created[0].data.get("traceparent") if created else None

    def _work(self, claim: Claim, claimed: float) -> Outcome:
        if self._cannot_match(claim):
            why = f"job {claim.job_id} is pinned to {claim.numerics_key!r}; this worker computes as {self._versions!r}"
            return self._give_back(claim, f"{NumericsMismatch.code}: {why}", MISMATCH_SECONDS)
        try:
            order = order_for(self._store, self._settings, self._scratch, claim)
        except CffaError as error:
            return self._refuse(claim, error)
        child = self._child_for(claim.job_id)
        with LeaseGuard(child, SAFE_SHARE_OF_LEASE * self._settings.lease_seconds, claimed) as guard:
            unit = LiveUnit(claim, child, guard, renewed=claimed, moved=time.monotonic() + START_SECONDS)
            child.send(order)
            outcome: Outcome | None = None
            while outcome is None:
                outcome = self._turn(unit, child.receive(TICK_SECONDS))
                self._on_tick()
        return outcome

    def _turn(self, unit: LiveUnit, report: Report | None) -> Outcome | None:
        """React to one report, or to none and the time that passed; an outcome ends the unit."""
        try:
            if unit.child.ended:
                return self._ended(unit)
            return self._heard(unit, report) or self._due(unit)
        except LeaseLost as error:
            return self._abandon(unit, error.message)
        except CffaError as error:
            if not error.retryable:
                raise
            return self._abandon(unit, error.message)

    # --- what the child says --------------------------------------------------------------------------------------

    def _heard(self, unit: LiveUnit, report: Report | None) -> Outcome | None:
        if isinstance(report, Beat):
            if report.steps > unit.steps:
                unit.steps, unit.moved = report.steps, time.monotonic()
            unit.progress = Progress(report.stage, report.current, report.total)
            unit.metrics.extend(report.metrics)
            self._metrics.heard(unit.claim, report)
        elif isinstance(report, Ready):
            self._pin(unit, report)
        elif isinstance(report, CheckpointSaved):
            saved = report
            unit.moved = time.monotonic()
            # First: a run resumed from this checkpoint will not report the steps before it again.
            self._insist(unit, lambda: self._write_metrics(unit))
            superseded = self._insist(unit, lambda: self._store.add_checkpoint(unit.claim, saved.step, saved.stored))
            unit.checkpoints += 1
            unit.child.send(Answer(accepted=True, superseded=superseded))
        elif isinstance(report, Done):
            return self._commit(unit, report)
        elif isinstance(report, Stopped):
            return self._give_back(unit.claim, unit.released_because, unit.avoid_seconds)
        elif isinstance(report, Failed):
            return self._failed(unit, report)
        return None

    def _pin(self, unit: LiveUnit, report: Ready) -> None:
        """Bind the job to the child's numerics, or tell the child to leave the unit to another worker."""
        unit.prepared, unit.moved = True, time.monotonic()
        self._versions = report.numerics_key.rsplit("/", 3)[0] + "/"
        try:
            self._insist(unit, lambda: self._store.pin_numerics(unit.claim, report.numerics_key))
        except NumericsMismatch as error:
            log.warning("%s", error.message)
            unit.released_because, unit.avoid_seconds = f"{error.code}: {error.message}", MISMATCH_SECONDS
            unit.child.send(Answer(accepted=False))
        else:
            unit.child.send(Answer(accepted=True))

    def _commit(self, unit: LiveUnit, done: Done) -> Outcome:
        self._insist(unit, lambda: self._write_metrics(unit))
        self._insist(
            unit,
            lambda: self._store.commit(
                unit.claim, done.stored, done.info, job_result=done.job_result, model=done.model
            ),
        )
        return Outcome("done")

    def _failed(self, unit: LiveUnit, report: Failed) -> Outcome:
        log.error("%s of %s failed: %s\n%s", unit.claim.kind, unit.claim.job_id, report.message, report.traceback)
        if report.code is None:
            self._drop_child()
            return self._count_crash(unit, report.message, report.traceback)
        if report.code == LeaseLost.code:
            return self._abandon(unit, report.message)
        if report.retryable:
            return self._give_back(unit.claim, f"{report.code}: {report.message}", UNAVAILABLE_SECONDS)
        code, details = report.code, "; ".join(f"{problem.pointer}: {problem.message}" for problem in report.problems)
        message = f"{report.message} ({details})" if details else report.message
        self._insist(unit, lambda: self._store.fail(unit.claim, code, message))
        return Outcome("failed")

    def _ended(self, unit: LiveUnit) -> Outcome:
        """The child is gone without a last word."""
        if unit.guard.expired:
            return self._abandon(unit, "the lease could not be renewed in time")
        reason = unit.child.exit_reason()
        self._drop_child()
        if unit.stopping is not None:
            return self._give_back(unit.claim, None)
        return self._count_crash(unit, reason, None)

    def _count_crash(self, unit: LiveUnit, reason: str, trace: str | None) -> Outcome:
        if not unit.prepared and unit.claim.kind not in COMPUTES_NOTHING:
            # It died while it fetched inputs or imported libraries: no fault of this job.
            self._give_back(unit.claim, f"worker_unwell: {reason}")
            return Outcome("crashed", unwell=True)
        log.warning("%s of %s crashed: %s", unit.claim.kind, unit.claim.job_id, reason)
        progress = unit.checkpoints > 0
        self._insist(unit, lambda: self._store.crashed(unit.claim, reason, made_progress=progress, detail=trace))
        return Outcome("crashed")

    # --- what time brings -----------------------------------------------------------------------------------------

    def _due(self, unit: LiveUnit) -> Outcome | None:
        """Everything that depends on the clock: stop, stall, renewal."""
        now = time.monotonic()
        if self._stop.is_set() and unit.stopping is None:
            self._ask_to_stop(unit, "shutdown", min(self._settings.cancel_grace_seconds, SHUTDOWN_SECONDS))
        if unit.stopping is not None and now > unit.deadline:
            log.warning("the child did not stop (%s) within its grace period; it is killed", unit.stopping)
            self._drop_child()
            return self._give_back(unit.claim, None)
        if now - unit.moved > self._settings.stall_seconds:
            self._drop_child()
            reason = f"no step within {self._settings.stall_seconds:g} s; the child was killed"
            self._insist(
                unit,
                lambda: self._store.crashed(unit.claim, reason, made_progress=unit.checkpoints > 0),
            )
            return Outcome("crashed")
        since = now - unit.renewed
        if since >= self._settings.renew_seconds or (unit.progress is not None and since >= REPORT_SECONDS):
            self._renew(unit)
        return None

    def _renew(self, unit: LiveUnit) -> None:
        """Renew, carry progress and metrics along, and obey; an unavailable record is tried again next tick."""
        asked = time.monotonic()
        try:
            order = self._store.renew(unit.claim, self._settings.lease_seconds, unit.progress)
            unit.renewed, unit.progress = asked, None
            unit.guard.renewed(asked)
            self._write_metrics(unit)
            if order == "wish":
                self._pass_on_wishes(unit)
        except LeaseLost:
            raise
        except CffaError as error:
            if not error.retryable:
                raise
            log.warning("the record could not be reached: %s", error.message)
            return
        if order in ("cancel", "pause") and unit.stopping is None:
            self._ask_to_stop(unit, order, self._settings.cancel_grace_seconds)

    def _pass_on_wishes(self, unit: LiveUnit) -> None:
        """Tell the child what its job's owner asks for, each wish once; the checkpoint it makes strikes it off."""
        for wish in sorted(self._store.wishes(unit.claim).items() - unit.told):
            unit.child.send(Wished(what=wish[0]))
            unit.told.add(wish)

    def _write_metrics(self, unit: LiveUnit) -> None:
        while unit.metrics:
            step, values = unit.metrics[0]
            self._store.add_metrics(unit.claim, step, values)
            unit.metrics.popleft()

    def _ask_to_stop(self, unit: LiveUnit, why: str, grace: float) -> None:
        if not unit.prepared and unit.claim.kind not in COMPUTES_NOTHING:
            grace = min(grace, UNPREPARED_SECONDS)  # it imports libraries, deaf to us, and has nothing to lose
        unit.stopping, unit.deadline = why, time.monotonic() + grace
        unit.child.send(Stop())

    # --- ways to end ----------------------------------------------------------------------------------------------

    def _abandon(self, unit: LiveUnit, why: str) -> Outcome:
        """End the child and touch nothing of the unit any more, except to free it in case it is still ours."""
        log.warning("%s of %s is abandoned: %s", unit.claim.kind, unit.claim.job_id, why)
        self._drop_child()
        self._give_back(unit.claim, None)
        return Outcome("lost")

    def _give_back(self, claim: Claim, reason: str | None, avoid_seconds: float = 0.0) -> Outcome:
        """Return the unit to the queue without penalty; if that fails its lease runs out by itself."""
        try:
            self._store.release(claim, reason=reason)
        except CffaError as error:
            log.info("%s of %s was not given back: %s", claim.kind, claim.job_id, error.message)
        return Outcome("released", avoid_seconds=avoid_seconds)

    def _refuse(self, claim: Claim, error: CffaError) -> Outcome:
        """The order could not be written: an input is gone, or the record is away."""
        if error.retryable:
            return self._give_back(claim, f"{error.code}: {error.message}", UNAVAILABLE_SECONDS)
        try:
            self._store.fail(claim, error.code, error.message)
        except CffaError as second:
            log.warning("%s could not be failed: %s", claim.job_id, second.message)
        return Outcome("failed")

    def _insist(self, unit: LiveUnit, write: Callable[[], T]) -> T:
        """Repeat a write while the record is away, as long as the lease is safe."""
        while True:
            try:
                return write()
            except CffaError as error:
                lease = SAFE_SHARE_OF_LEASE * self._settings.lease_seconds
                if not error.retryable or time.monotonic() - unit.renewed > lease:
                    raise
            time.sleep(RETRY_SECONDS)

    def _cannot_match(self, claim: Claim) -> bool:
        """Whether this worker is known to compute otherwise than the job is bound to."""
        return (
            claim.kind not in COMPUTES_NOTHING
            and claim.numerics_key is not None
            and self._versions is not None
            and not claim.numerics_key.startswith(self._versions)
        )

    def _child_for(self, job_id: str) -> ChildProcess:
        if self._child is None or not self._child.usable or self._child.job_id != job_id:
            self.rest()
            self._child = ChildProcess(self._command, job_id, threads=self._threads)
        return self._child

    def _drop_child(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child = None
            self._metrics.child_gone()
