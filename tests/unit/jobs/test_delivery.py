"""How many messages a queue should hold, and what both ends tell Celery."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cffa_core.jobs.delivery import MESSAGES_PER_WORKER, broker_settings, queue_of, shortfall
from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings

COUNTS = st.integers(min_value=0, max_value=20_000)


@pytest.mark.parametrize(
    ("waiting", "workers", "queued", "expected"),
    [
        (10_000, 3, 0, 6),
        (10_000, 3, 4, 2),
        (10_000, 3, 6, 0),
        (10_000, 3, 900, 0),
        (1, 3, 0, 1),
        (0, 3, 0, 0),
        (5, 0, 0, 0),
    ],
)
def test_a_queue_is_filled_up_to_twice_its_workers_and_no_further_than_there_is_work(
    waiting: int, workers: int, queued: int, expected: int
) -> None:
    assert shortfall(waiting=waiting, workers=workers, queued=queued) == expected


@given(COUNTS, COUNTS, COUNTS)
def test_repeating_the_top_up_publishes_nothing_more(waiting: int, workers: int, queued: int) -> None:
    filled = queued + shortfall(waiting=waiting, workers=workers, queued=queued)
    assert filled <= max(queued, min(waiting, MESSAGES_PER_WORKER * workers))
    assert shortfall(waiting=waiting, workers=workers, queued=filled) == 0


def test_queues_are_named_after_kinds() -> None:
    assert [queue_of(kind) for kind in Kind] == [
        "training",
        "generation",
        "evaluation",
        "export",
        "attention",
        "edit",
        "captioned_training",
        "captioned",
    ]


def test_only_json_is_spoken_and_nothing_waits_for_ever() -> None:
    settings = Settings(
        mode="cluster",
        database_url="sqlite://",
        broker_url="redis://broker:6379/0",
        broker_password="of-the-broker",
        s3_endpoint="http://s3:9000",
        s3_access_key="cffa",
        s3_secret_key="long-enough-for-a-test",
    )
    told = broker_settings(settings)
    assert told["broker_url"] == "redis://:of-the-broker@broker:6379/0"
    assert {told[name] for name in told if name.endswith("_serializer")} == {"json"}
    assert told["accept_content"] == ["json"]
    assert all(value for name, value in told["broker_transport_options"].items() if "timeout" in name)


def test_an_idle_worker_looks_for_work_less_often_where_a_broker_wakes_it() -> None:
    assert Settings().poll_seconds == 1.0
    cluster = Settings(
        mode="cluster",
        database_url="sqlite://",
        broker_url="redis://broker:6379/0",
        s3_endpoint="http://s3:9000",
        s3_access_key="cffa",
        s3_secret_key="long-enough-for-a-test",
    )
    assert cluster.poll_seconds == 10.0
    assert Settings(poll_seconds=3.0).poll_seconds == 3.0
