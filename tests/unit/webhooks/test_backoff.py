"""When a delivery is tried again."""

from __future__ import annotations

import pytest

from cffa_core.webhooks.backoff import Backoff


def exactly(low: float, high: float) -> float:
    assert (low, high) == (0.8, 1.2)
    return 1.0


def test_the_schedule_of_a_day() -> None:
    backoff = Backoff()
    pauses = [backoff.pause(tries, uniform=exactly) for tries in range(1, 13)]
    assert pauses == [5, 15, 45, 135, 405, 1215, 3645, 10935, 21600, 21600, 21600, None]
    assert 22 * 3600 < sum(pause or 0.0 for pause in pauses) < 24 * 3600


def test_pauses_differ_by_a_fifth_at_most() -> None:
    pauses = [Backoff().pause(3) or 0.0 for _ in range(300)]
    assert 36 <= min(pauses) < 39 and 51 < max(pauses) <= 54


@pytest.mark.parametrize(("asked", "pause"), [(None, 5.0), (1.0, 5.0), (600.0, 600.0), (1e9, 21_600.0), (-3.0, 5.0)])
def test_what_the_receiver_asks_for_is_waited_for_within_reason(asked: float | None, pause: float) -> None:
    assert Backoff().pause(1, asked, exactly) == pause


def test_a_single_try() -> None:
    assert Backoff(tries=1).pause(1) is None
