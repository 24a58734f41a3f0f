"""Jobs that requests wait for: one reader per job looks at it four times a second and hands each look to all who wait.

A hundred streams of one job cost the record as much as one. Knows neither HTTP nor event streams; a request that does
not wait reads the record itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from cffa_core.errors import CffaError
from cffa_core.jobs.records import Event, Job
from cffa_core.jobs.store import JobStore

WATCH_SECONDS = 0.25
PAGE = 100
KEPT = 2 * PAGE
_log = logging.getLogger("cffa.api")


@dataclass(frozen=True)
class Look:
    """What one look found: the job, and all its events after ``since`` up to the last one that was read.

    ``events`` is None where nobody has asked for events yet; ``more`` says that there were more than one look reads.
    """

    job: Job
    since: int
    events: tuple[Event, ...] | None
    more: bool

    def after(self, seq: int) -> list[Event] | None:
        """Events after ``seq``, or None if this look does not reach back so far."""
        if self.events is None or seq < self.since:
            return None
        return [event for event in self.events if event.seq > seq]


class Watch:
    """One job under observation; taken from :meth:`Watches.of`, used on the event loop only."""

    def __init__(self, store: JobStore, owner: str, job_id: str) -> None:
        self.readers = 0
        self._store = store
        self._owner = owner
        self._job_id = job_id
        self._since: int | None = None
        self._events: deque[Event] = deque()
        self._turn: asyncio.Future[Look] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._run())

    def follow(self, after: int) -> None:
        """Read events too, from ``after`` on if nobody asked for any before."""
        if self._since is None:
            self._since = after

    async def next(self) -> Look:
        """A look that begins after this call; raises what the record raises (``NotFound``: the job was deleted)."""
        return await asyncio.shield(self._turn)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Whoever asks from here on may have seen more than this look will: they get the next one.
            turn, self._turn = self._turn, loop.create_future()
            try:
                turn.set_result(await run_in_threadpool(self._look))
            except Exception as error:  # noqa: BLE001 - whoever waits gets it; else they would wait for ever
                turn.set_exception(error)
                turn.exception()  # nobody may be waiting just now; then it is no news
                if not isinstance(error, CffaError):
                    _log.exception("job %s cannot be watched", self._job_id)
            await asyncio.sleep(WATCH_SECONDS)

    def _look(self) -> Look:
        """The state is read before the events, so that none is missed when the job ends."""
        job = self._store.get_job(self._owner, self._job_id)
        if self._since is None:
            return Look(job, 0, None, more=False)
        last = self._events[-1].seq if self._events else self._since
        found = self._store.events(self._owner, self._job_id, last, PAGE)
        self._events.extend(found)
        while len(self._events) > KEPT:
            self._since = self._events.popleft().seq
        return Look(job, self._since, tuple(self._events), more=len(found) == PAGE)

    def stop(self) -> None:
        """End it: the last reader has left."""
        self._task.cancel()


class Watches:
    """The watched jobs of one process."""

    def __init__(self) -> None:
        self._watches: dict[tuple[str, str], Watch] = {}

    def __len__(self) -> int:
        return len(self._watches)

    @contextmanager
    def of(self, store: JobStore, owner: str, job_id: str) -> Iterator[Watch]:
        """The watch of this job, shared with whoever else waits for it; it ends when the last of them leaves."""
        key = (owner, job_id)
        watch = self._watches.get(key) or self._watches.setdefault(key, Watch(store, owner, job_id))
        watch.readers += 1
        try:
            yield watch
        finally:
            watch.readers -= 1
            if watch.readers == 0:
                del self._watches[key]
                watch.stop()
