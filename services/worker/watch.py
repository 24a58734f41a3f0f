"""A worker's watch over its own hearing, and its share in the top-up of the queues.

A worker can lose its subscription without an error: the broker answers, but no message arrives. So an idle worker now
and then sends itself a message through the queue it listens to. If that does not come back, the consumer connects
anew; if that does not help either, the process ends, so that whoever keeps it starts a fresh one. Nothing here knows
Celery's worker or the claim loop.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

from cffa_core.errors import CffaError
from services.worker.intervals import Intervals
from services.worker.outbox import BROKER_ERRORS, Outbox

TICK_SECONDS = 0.5

log = logging.getLogger("cffa.worker")


@dataclass(frozen=True)
class Patience:
    """Seconds between the probes of an idle worker; unanswered ones until it connects anew, and until it ends.

    They are counted rather than timed, so that a process that was stopped for a while is not taken for a deaf one.
    """

    seconds: float = 10.0
    revive: int = 2
    give_up: int = 5


class Watch:
    """The watch of one worker, on a thread of its own between :meth:`start` and :meth:`stop`.

    ``idle`` says whether the worker waits for messages (it listens to nothing while it works), ``revive`` makes it
    connect anew, ``give_up`` ends the process; the latter is also called if the watch itself fails. ``top_up`` is
    called every ``top_up_seconds``.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        idle: Callable[[], bool],
        revive: Callable[[], bool],
        give_up: Callable[[], None],
        top_up: Callable[[], int],
        top_up_seconds: float,
        patience: Patience,
    ) -> None:
        self._outbox = outbox
        self._idle = idle
        self._revive = revive
        self._give_up = give_up
        self._top_up = top_up
        self._top_up_seconds = top_up_seconds
        self._patience = patience
        self._stopping = threading.Event()
        self._unanswered = 0
        self._revived = False
        self._reachable = True
        self._intervals = Intervals()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """End; waits no longer than ``seconds``, and not at all on the watch's own thread."""
        self._stopping.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(seconds)

    def heard(self) -> None:
        """A probe arrived. May be called from any thread."""
        self._unanswered = 0
        if self._revived:
            self._revived = False
            log.info("messages arrive again")

    def _run(self) -> None:
        try:
            while not self._stopping.wait(TICK_SECONDS):
                self._round()
            self._outbox.close()
        finally:
            if not self._stopping.is_set():
                self._give_up()

    def _round(self) -> None:
        try:
            if self._intervals.due("top-up", self._top_up_seconds) and (published := self._top_up()):
                log.info("%d messages for units nobody was told of", published)
            if not self._idle():
                self._unanswered = 0
            elif self._intervals.due("probe", self._patience.seconds):
                self._probe()
        except CffaError as error:
            log.warning("the record: %s", error.message)
        except BROKER_ERRORS as error:
            self._unanswered = 0  # where nothing can be sent, silence says nothing
            if self._reachable:
                log.warning("the broker cannot be reached, work is looked for without it: %s", error)
            self._reachable = False

    def _probe(self) -> None:
        """Send one more probe, or act if too many were not answered."""
        silent = self._unanswered
        if silent >= self._patience.give_up:
            log.error("%d probes did not arrive although the broker answers; the worker ends", silent)
            self._stopping.set()
            self._give_up()
            return
        if silent >= self._patience.revive and not self._revived:
            log.warning("%d probes did not arrive although the broker answers; connecting anew", silent)
            self._revived = self._revive()
        self._unanswered = silent + 1  # before it is sent: the answer may come at once
        self._outbox.probe(str(silent))
        if not self._reachable:
            log.info("the broker answers again")
        self._reachable = True
