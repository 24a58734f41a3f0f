"""The API's end of the queue, on a real Redis: it wakes workers, never floods, and never makes a request wait."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from cffa_core.jobs.delivery import TASK
from cffa_core.jobs.records import Job
from cffa_core.jobs.spec import TrainingSpec
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from services.api import delivery
from services.api.delivery import Delivery
from tests.record_cases import add_dataset
from tests.servers import Server, running

pytestmark = pytest.mark.xdist_group("redis")


def settings_for(folder: Path, server: Server) -> Settings:
    return Settings(
        mode="cluster",
        home=folder,
        database_url=f"sqlite:///{folder / 'record.sqlite'}",
        broker_url=server.url,
        s3_endpoint="http://127.0.0.1:9",
        s3_access_key="cffa",
        s3_secret_key="only-for-servers-on-loopback",
    )


def post(store: JobStore) -> Job:
    job, _ = store.create_job("anna", TrainingSpec(dataset_id=add_dataset(store, "anna"), base="micro"))
    return job


def wait(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_a_message_per_job_but_no_more_than_two_per_worker_and_none_lost_while_the_broker_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "PAUSE_SECONDS", 0.5)
    with running("redis") as server, redis.Redis.from_url(server.url, decode_responses=True) as broker:
        settings = settings_for(tmp_path, server)
        store = JobStore(settings.record_url)
        store.migrate()
        first, others = post(store), [post(store) for _ in range(20)]
        with Delivery(settings, store) as sender:
            sender.announce(first)
            wait(lambda: broker.llen("training") == 1)
            message = json.loads(broker.lindex("training", 0))
            assert message["headers"]["task"] == TASK
            assert message["content-type"] == "application/json"
            assert first.id in message["headers"]["argsrepr"]
            for job in others:
                sender.announce(job)
            wait(lambda: broker.llen("training") == 2)
            assert broker.llen("generation") == 0

            broker.delete("training")
            server.kill()
            begun = time.monotonic()
            sender.announce(first)
            assert time.monotonic() - begun < 0.1
            wait(lambda: "no worker was woken" in caplog.text)
            server.start()
            wait(lambda: broker.llen("training") == 1)
        store.close()


def test_closing_delivers_what_was_noted(tmp_path: Path, redis_server: Server) -> None:
    settings = settings_for(tmp_path, redis_server)
    store = JobStore(settings.record_url)
    store.migrate()
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as broker:
        broker.delete("training")
        with Delivery(settings, store) as sender:
            sender.announce(post(store))
        assert broker.llen("training") == 1
        broker.delete("training")
    store.close()


def test_closing_waits_for_no_dead_broker(tmp_path: Path) -> None:
    with running("redis") as server:
        settings = settings_for(tmp_path, server)
        server.kill()
        store = JobStore(settings.record_url)
        store.migrate()
        sender = Delivery(settings, store)
        with sender:
            sender.announce(post(store))
            begun = time.monotonic()
        assert time.monotonic() - begun < delivery.CLOSE_SECONDS + 1.0
        store.close()


def test_without_a_broker_nothing_is_published(settings: Settings) -> None:
    store = JobStore(settings.record_url)
    with Delivery(settings, store) as sender:
        sender.announce(post(store))
    store.close()
