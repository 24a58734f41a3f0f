"""The claim loop: sweep now and then, take a unit, hand it to the supervisor, wait when there is none.

Whatever delivers work only wakes this loop (:meth:`Worker.wake`, :meth:`Worker.work_off`); what is worked on is always
claimed from the record, one unit at a time. It works the same with a broker, without one, and while one is away.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from cffa_core import __version__, logs
from cffa_core.errors import CffaError, NotFound
from cffa_core.jobs.records import Claim
from cffa_core.jobs.spec import SPEC_VERSION, Kind
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from services.worker.intervals import Intervals
from services.worker.metrics import WorkerMetrics
from services.worker.scratch import Scratch
from services.worker.supervisor import CHILD_COMMAND, Supervisor

KEEP_CHILD_SECONDS = 10.0
LONGEST_REST = 60.0
FIRST_REST = 0.5
LONGEST_AVOIDANCE = 600.0
STOP_CHECK_SECONDS = 1.0
RECORD_SECONDS = 1.0

log = logging.getLogger("cffa.worker")


class Worker:
    """One worker: claims units of ``kinds`` and does them one at a time until :meth:`stop`.

    ``facts`` are added to what the worker says of itself in the record.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        kinds: Collection[Kind] = tuple(Kind),
        child_command: Sequence[str] = CHILD_COMMAND,
        metrics: WorkerMetrics | None = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.facts: dict[str, Any] = {} if facts is None else facts
        self.store = JobStore(
            settings.record_url,
            max_crashes=settings.max_crashes,
            max_expiries=settings.max_expiries,
            owner_running_units=settings.owner_running_units,
            application="cffa-worker",
        )
        self._settings = settings
        self._kinds = tuple(kinds)
        self._threads = settings.threads or len(os.sched_getaffinity(0))
        self._metrics = metrics or WorkerMetrics()
        self._scratch = Scratch(settings.scratch_dir, self.id)
        self._supervisor = Supervisor(
            settings,
            self.store,
            self._scratch,
            threads=self._threads,
            child_command=child_command,
            on_tick=self._keep_house,
            metrics=self._metrics,
        )
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._idle = threading.Condition()
        self._asked = 0
        self._answered = 0
        self._resting = False
        self._working = False
        self._intervals = Intervals()
        self._avoided: dict[str, tuple[float, float]] = {}
        self._unwell = 0
        self._registered_versions: str | None = None
        self._refuses: str | None = None

    @property
    def idle(self) -> bool:
        """Whether the loop found nothing to do and waits to be woken."""
        return self._resting

    @property
    def wakeable(self) -> bool:
        """Whether a message can make a difference here: no unit is in hand, and the worker was not stopped."""
        return not self._working and not self._stop.is_set()

    def stop(self) -> None:
        """Claim nothing more, give back the unit in hand at its next safe point, return from :meth:`run`."""
        self._stop.set()
        self._supervisor.stop()
        self._wake.set()

    def wake(self) -> None:
        """Look for work now instead of at the next poll."""
        self._wake.set()

    def work_off(self, leave: Callable[[], bool] = lambda: False) -> None:
        """Wake the loop and wait until it finds nothing more to claim, was stopped, or ``leave()`` says so."""
        with self._idle:
            self._asked += 1
            ask = self._asked
            self._wake.set()
            while self._answered < ask and not self._stop.is_set() and not leave():
                self._idle.wait(STOP_CHECK_SECONDS)

    def run(self) -> int:
        """Work until stopped; returns the process's exit code. An unreachable record is waited for."""
        with logs.about(worker=self.id):
            return self._run()

    def _run(self) -> int:
        # A cluster's schema is set up once, before its workers start; they wait for that as for the record itself.
        embedded = self._settings.mode == "embedded"
        self._until_available(self.store.migrate if embedded else self.store.require_schema)
        self._until_available(self._register)
        log.info("worker %s started with %d threads", self.id, self._threads)
        idle_since = time.monotonic()
        try:
            while not self._stop.is_set():
                self._wake.clear()
                self._keep_house()
                asks = self._asked
                asked = time.monotonic()
                claim = self._claim()
                if claim is not None:
                    self._work(claim, asked)
                    idle_since = time.monotonic()
                    continue
                self._answer(asks)
                if time.monotonic() - idle_since > KEEP_CHILD_SECONDS:
                    self._supervisor.rest()
                self._rest()
        finally:
            self._close()
        return 0

    def _rest(self) -> None:
        """Wait for the next poll or until woken, and keep house meanwhile."""
        end = time.monotonic() + self._settings.poll_seconds
        nap = min(self._settings.sweep_seconds, self._settings.renew_seconds)
        while (left := end - time.monotonic()) > 0:
            self._resting = True
            woken = self._wake.wait(min(left, nap))
            self._resting = False
            if woken:
                return
            self._keep_house()

    def _answer(self, asks: int) -> None:
        """Tell those who asked before the last claim that nothing is left."""
        with self._idle:
            self._answered = asks
            self._idle.notify_all()

    def _claim(self) -> Claim | None:
        """A unit that this worker can surely do, else one it may turn out to have to leave to others."""
        now = time.monotonic()
        avoid = [job_id for job_id, (until, _) in self._avoided.items() if now < until]
        versions = self._supervisor.versions
        try:
            for numerics in (versions, None) if versions is not None else (None,):
                claim = self.store.claim(
                    self.id,
                    self._kinds,
                    lease_seconds=self._settings.lease_seconds,
                    prefer_job=self._supervisor.warm_job,
                    numerics=numerics,
                    avoid=avoid,
                )
                if claim is not None:
                    return claim
        except CffaError as error:
            log.warning("no claim: %s", error.message)
        return None

    def _work(self, claim: Claim, claimed: float) -> None:
        unit = f"{claim.kind} {claim.index}"
        with logs.about(job_id=claim.job_id, unit=unit, attempt=claim.attempt):
            self._work_on(claim, claimed)

    def _work_on(self, claim: Claim, claimed: float) -> None:
        log.info("%s %d of %s, attempt %d", claim.kind, claim.index, claim.job_id, claim.attempt)
        self._working = True
        try:
            with self._metrics.working():
                outcome = self._supervisor.work(claim, claimed)
        finally:
            self._working = False
        log.info("%s %d of %s: %s", claim.kind, claim.index, claim.job_id, outcome.kind)
        self._metrics.ended(claim, outcome)
        if outcome.avoid_seconds:
            _, before = self._avoided.get(claim.job_id, (0.0, outcome.avoid_seconds / 2))
            seconds = min(LONGEST_AVOIDANCE, 2 * before)
            self._avoided[claim.job_id] = (time.monotonic() + seconds, seconds)
        else:
            self._avoided.pop(claim.job_id, None)
        if self._supervisor.versions != self._registered_versions:
            self._attempt(self._register)
        self._unwell = self._unwell + 1 if outcome.unwell else 0
        if self._unwell:
            self._stop.wait(min(LONGEST_REST, FIRST_REST * 2 ** (self._unwell - 1)))

    def _keep_house(self) -> None:
        """Heartbeat and sweep, each when due."""
        if self._intervals.due("heartbeat", self._settings.renew_seconds):
            self._attempt(self._beat)
        if self._intervals.due("sweep", self._settings.sweep_seconds):
            self._attempt(self._sweep)
            self._attempt(self._look_for_newer)

    def _beat(self) -> None:
        try:
            self.store.heartbeat(self.id)
        except NotFound:
            self._register()

    def _sweep(self) -> None:
        if freed := self.store.sweep():
            log.info("%d expired leases freed", freed)
            self._wake.set()

    def _look_for_newer(self) -> None:
        """Say, here and in the list of workers, when jobs wait that this version is too old for."""
        found = self.store.too_new(self._kinds)
        refuses = None
        if found is not None:
            refuses = f"spec version {found[1]}: this worker knows {SPEC_VERSION}; replace it"
        if refuses != self._refuses:
            self._refuses = refuses
            if found is not None:
                log.warning("%d waiting jobs are left to newer workers: %s", found[0], refuses)
            self._register()

    def _register(self) -> None:
        versions = self._supervisor.versions
        info = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "kinds": [str(kind) for kind in self._kinds],
            "device": self._settings.device,
            "threads": self._threads,
            "version": __version__,
            "spec_version": SPEC_VERSION,
            "refuses": self._refuses,
            # Device model and library versions; known once a child has loaded them.
            "numerics": versions.rstrip("/") if versions is not None else None,
            **self.facts,
        }
        self.store.register_worker(self.id, info)
        self._registered_versions = versions

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except CffaError as error:
            log.warning("the record: %s", error.message)

    def _until_available(self, action: Callable[[], None]) -> None:
        """Repeat ``action`` until the record answers or the worker is stopped."""
        while not self._stop.is_set():
            try:
                action()
            except CffaError as error:
                if not error.retryable:
                    raise
                log.warning("waiting for the record: %s", error.message)
                self._stop.wait(min(self._settings.poll_seconds, RECORD_SECONDS))
            else:
                return

    def _close(self) -> None:
        self._supervisor.rest()
        self._attempt(lambda: self.store.remove_worker(self.id))
        self.store.close()
        self._scratch.close()
