"""A worker's watch over its own hearing, and its share in the top-up of the queues.

A worker can lose its subscription without an error: the broker answers, but no message arrives. So an idle worker now
and then sends itself a message through the queue it listens to. If that does not come back, the consumer connects
anew; if that does not help either, the process ends, so that whoever keeps it starts a fresh one. Nothing here knows
Celery's worker or the claim loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cffa_core.errors import CffaError
from services.worker.outbox import BROKER_ERRORS, Outbox

TICK_SECONDS = 0.5

log = logging.getLogger("cffa.worker")


@dataclass(frozen=True)
class Patience:
    """Seconds: between probes of an idle worker, until it connects anew, and (from the same probe) until it ends."""

    probe: float = 10.0
    revive: float = 15.0
    give_up: float = 40.0


class Watch:
    """The watch of one worker, on a thread of its own between :meth:`start` and :meth:`stop`.

    ``busy`` says whether the worker has something in hand (it listens to nothing then), ``revive`` makes it connect
    anew, ``give_up`` ends the process; the latter is also called if the watch itself fails. ``top_up`` is called
    every ``top_up_seconds``.
    """

    def __init__(
        self,
        outbox: Outbox,
        *,
        busy: Callable[[], bool],
        revive: Callable[[], bool],
        give_up: Callable[[], None],
        top_up: Callable[[], int],
        top_up_seconds: float,
        patience: Patience,
    ) -> None:
        self._outbox = outbox
        self._busy = busy
        self._revive = revive
        self._give_up = give_up
        self._top_up = top_up
        self._top_up_seconds = top_up_seconds
        self._patience = patience
        self._stopping = threading.Event()
        self._unanswered: float | None = None
        self._revived = False
        self._reachable = True
        self._due: dict[str, float] = {}
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
        self._unanswered = None
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
            if self._is_due("top-up", self._top_up_seconds) and (published := self._top_up()):
                log.info("%d messages for units nobody was told of", published)
            if self._busy():
                self._unanswered, self._revived = None, False
            else:
                self._listen()
        except CffaError as error:
            log.warning("the record: %s", error.message)
        except BROKER_ERRORS as error:
            self._unanswered = None  # where nothing can be sent, silence says nothing
            if self._reachable:
                log.warning("the broker cannot be reached, work is looked for without it: %s", error)
            self._reachable = False

    def _listen(self) -> None:
        if self._is_due("probe", self._patience.probe):
            sent = time.monotonic()
            since = self._unanswered if self._unanswered is not None else sent
            self._unanswered = since  # before it is sent: the answer may come at once
            self._outbox.probe("")
            if not self._reachable:
                log.info("the broker answers again")
            self._reachable = True
        if self._unanswered is None:
            return
        silent = time.monotonic() - self._unanswered
        if silent > self._patience.give_up:
            log.error("no message arrived for %.0f s although the broker answers; the worker ends", silent)
            self._stopping.set()
            self._give_up()
        elif silent > self._patience.revive and not self._revived:
            self._revived = self._revive()
            log.warning("no message arrived for %.0f s although the broker answers; connecting anew", silent)

    def _is_due(self, what: str, every: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every
        return True
