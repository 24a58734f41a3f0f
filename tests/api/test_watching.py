"""One reader per watched job, whoever waits for it: looks are shared, later than the question, and end with it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.store import JobStore
from services.api import watching
from services.api.access import Backend
from services.api.watching import Look, Watches
from tests.api.driving import Worker
from tests.api.test_events import STREAM, messages

OWNER = "local"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the record was asked for a job and for events."""
    counted: Counter[str] = Counter()
    for name in ("get_job", "events"):
        original = getattr(JobStore, name)

        def counting(self: JobStore, *values: Any, _name: str = name, _original: Any = original) -> Any:
            counted[_name] += 1
            return _original(self, *values)

        monkeypatch.setattr(JobStore, name, counting)
    return counted


def test_streams_and_long_polls_of_one_job_share_one_reader(
    client: TestClient, backend: Backend, generation: str, reads: Counter[str]
) -> None:
    path = f"/v1/jobs/{generation}"

    def stream() -> str:
        return client.get(f"{path}/events", headers=STREAM).text

    def poll() -> int:
        return client.get(path, params={"wait": 30}).json()["version"]

    with ThreadPoolExecutor(16) as pool:
        streams = [pool.submit(stream) for _ in range(10)]
        polls = [pool.submit(poll) for _ in range(6)]
        while not (watched := list(backend.watches._watches.values())) or watched[0].readers < 16:
            time.sleep(0.01)
        assert len(backend.watches) == 1
        reads.clear()
        time.sleep(4 * watching.WATCH_SECONDS)
        assert reads["get_job"] <= 5 and reads["events"] <= 5
        backend.store.cancel_job(OWNER, generation)
        texts = [waiting.result(timeout=10) for waiting in streams]
        versions = [waiting.result(timeout=10) for waiting in polls]
    last = client.get(path).json()
    assert set(versions) == {last["version"]}
    listed = client.get(f"{path}/events").json()["items"]
    assert all([message["id"] for message in messages(text)] == [str(e["seq"]) for e in listed] for text in texts)
    assert len(backend.watches) == 0


def test_a_stream_that_lags_behind_what_is_kept_misses_nothing(
    client: TestClient, backend: Backend, worker: Worker, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "KEPT", 1)
    ending = threading.Timer(0.3, lambda: [worker.make_part() for _ in range(4)])
    ending.start()
    found = messages(client.get(f"/v1/jobs/{generation}/events", headers=STREAM).text)
    ending.join()
    listed = client.get(f"/v1/jobs/{generation}/events").json()["items"]
    assert [message["id"] for message in found] == [str(event["seq"]) for event in listed]
    assert client.get(f"/v1/jobs/{generation}").json()["state"] == "succeeded"


def test_a_look_begins_after_it_was_asked_for(backend: Backend, generation: str) -> None:
    """Else a request could answer with less than its client has seen already."""

    async def watch() -> list[tuple[int, int]]:
        watches = Watches()
        seen = []
        with watches.of(backend.store, OWNER, generation) as watch:
            for act in (backend.store.pause_job, backend.store.resume_job) * 3:
                known = await asyncio.to_thread(act, OWNER, generation)
                look: Look = await watch.next()
                seen.append((known.version, look.job.version))
        return seen

    assert all(found >= known for known, found in asyncio.run(watch()))
