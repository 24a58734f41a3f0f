"""The top-up: messages for units that wait and that nobody was told of, because a message was lost or never sent.

Any number of workers may call it as often as they like; one at a time gets the turn. The arithmetic is in
``cffa_core.jobs.delivery``.
"""

from __future__ import annotations

from cffa_core.jobs.delivery import shortfall
from cffa_core.jobs.records import LIVE_WORKER_SECONDS
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.store import JobStore
from services.worker.outbox import Outbox

TURN = "top-up"


def top_up(store: JobStore, outbox: Outbox, *, every: float) -> int:
    """Fill the queues up to twice their live workers, if it is this process's turn; returns the messages published.

    There is one turn per ``every`` seconds. Raises what the record or the broker raises.
    """
    # The broker is asked first: without one, the turn is left to a process that has it.
    queued = {kind: outbox.queued(kind) for kind in Kind}
    if not store.take_turn(TURN, every):
        return 0
    summary = store.queue_summary()
    kinds = [worker.info.get("kinds", ()) for worker in store.list_workers(seen_within=LIVE_WORKER_SECONDS)]
    published = 0
    for kind in Kind:
        workers = sum(kind.value in taken for taken in kinds)
        waiting = summary[kind].waiting_units if kind in summary else 0
        missing = shortfall(waiting=waiting, workers=workers, queued=queued[kind])
        outbox.wake(kind, missing)
        published += missing
    return published
