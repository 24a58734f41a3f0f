"""Each thing is due at once and then once per interval; one thing's turn does not touch another's."""

from __future__ import annotations

from services.worker.intervals import Intervals


def test_each_thing_has_its_own_turn() -> None:
    now = 1000.0
    intervals = Intervals(lambda: now)
    assert intervals.due("sweep", 5.0) and intervals.due("heartbeat", 2.0)
    assert not intervals.due("sweep", 5.0)
    now = 1002.0
    assert intervals.due("heartbeat", 2.0) and not intervals.due("sweep", 5.0)
    now = 1020.0
    assert intervals.due("sweep", 5.0)
    assert not intervals.due("sweep", 5.0), "turns that were missed are not made up for"
