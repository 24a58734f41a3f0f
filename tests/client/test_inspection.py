"""Looking closely, and waiting on an event loop, at a real service with a real job."""

from __future__ import annotations

import asyncio
import json
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cffa_core.errors import NotFound
from cffa_core.jobs.spec import TrainSettings
from services.client.asynchronous import AsyncClient
from services.client.cli import app
from services.client.client import CffaClient
from services.client.event_stream import Event, EventLines
from services.client.resources import Job
from services.client.servers import Servers

NOWHERE = "job_00000000000000000000"
SETTINGS = TrainSettings(
    base="micro", resolution=64, steps=2, validate_every=2, checkpoint_every=2, preview_every=2, preview_pairs=0
)


def test_lines_become_events() -> None:
    lines = EventLines()
    text = (
        ': ping\n\nid: 1\nevent: state\ndata: {"seq": 1, "at": "2026-11-21T12:00:00Z",\ndata: "type": "a", "data": {}}'
    )
    assert [lines.feed(line) for line in text.split("\n")] == [None] * 6
    event = lines.feed("")
    assert event is not None and (event.seq, event.type) == (1, "a")
    assert lines.feed("") is None


def test_a_training_looked_at_closely(client: CffaClient, pairs_folder: Path) -> None:
    dataset = client.upload_dataset(pairs_folder)

    async def watched() -> tuple[str, list[int], list[str]]:
        async with AsyncClient(client.base_url) as waiting:
            job = await waiting.call(CffaClient.submit_training, dataset.id, SETTINGS)
            streams = [asyncio.create_task(numbers(waiting, job.id)) for _ in range(3)]
            ended = await asyncio.gather(waiting.wait(job.id), waiting.wait(job.id))
            return job.id, [number for stream in streams for number in await stream], [one.state for one in ended]

    async def numbers(waiting: AsyncClient, job_id: str) -> list[int]:
        return [event.seq async for event in waiting.follow(job_id)]

    job_id, seen, states = asyncio.run(watched())
    assert states == ["succeeded"] * 2
    history = list(client.inspect.events(job_id))
    assert seen == [event.seq for event in history] * 3
    assert [event.seq for event in client.inspect.follow(job_id)] == [event.seq for event in history]
    assert list(client.inspect.follow(job_id, after=history[-1].seq)) == []
    assert {point.step for point in client.inspect.metrics(job_id)} == {1, 2}
    assert [set(point.values) for point in client.inspect.metrics(job_id, key="eps_cf")] == [{"eps_cf"}, {"eps_cf"}]
    assert [point.step for point in client.inspect.checkpoints(job_id)][-1] == 2
    assert client.inspect.model_card(client.model_of(job_id).id)["base"]["name"] == "micro"
    assert sorted(pair.name for pair in client.inspect.dataset_pairs(dataset.id)) == sorted(
        path.stem for path in (pairs_folder / "cf").iterdir()
    )
    assert set(client.inspect.ready().values()) == {"ok"}
    assert len(client.inspect.workers()) == 1
    shown = CliRunner().invoke(app, ["job", "events", job_id, "--follow", "--url", client.base_url])
    assert shown.exit_code == 0 and len(shown.output.splitlines()) == len(history)
    shown = CliRunner().invoke(app, ["job", "metrics", job_id, "--json", "--url", client.base_url])
    assert [point["step"] for point in json.loads(shown.output)] == [1, 2]
    assert CliRunner().invoke(app, ["workers", "--url", client.base_url]).exit_code == 0
    listed = CliRunner().invoke(app, ["models", "--json", "--url", client.base_url])
    assert job_id in [model["job_id"] for model in json.loads(listed.stdout)]
    assert job_id in CliRunner().invoke(app, ["models", "--url", client.base_url]).stdout


def test_what_is_not_there(client: CffaClient) -> None:
    async def follow() -> None:
        async with AsyncClient(client.base_url) as waiting:
            await waiting.wait(NOWHERE)

    with pytest.raises(NotFound):
        asyncio.run(follow())
    with pytest.raises(NotFound):
        list(client.inspect.follow(NOWHERE))
    with pytest.raises(NotFound):
        list(client.inspect.events(NOWHERE))


def test_a_stream_outlives_the_server_that_sent_it(tmp_path: Path, pairs_folder: Path) -> None:
    with Servers(tmp_path / "home", workers=0, logs=tmp_path / "logs") as servers, CffaClient(servers.url) as client:
        servers.wait_ready()
        job = client.submit_training(client.upload_dataset(pairs_folder).id, SETTINGS)  # nobody takes it
        seen: queue.Queue[Event] = queue.Queue()

        def look() -> None:
            for event in client.inspect.follow(job.id):
                seen.put(event)

        async def wait() -> Job:
            async with AsyncClient(servers.url) as waiting:
                return await waiting.wait(job.id)

        with ThreadPoolExecutor(2) as threads:
            watched, ended = threads.submit(look), threads.submit(asyncio.run, wait())
            first = seen.get(timeout=30)
            before = servers.children[0].process
            assert before is not None
            before.terminate()  # a stop in peace: every stream is ended as if it were complete
            assert before.wait(30) is not None
            servers.wait_ready()
            assert not watched.done() and not ended.done()
            client.cancel(job.id)
            watched.result(60)
            assert ended.result(60).state == "canceled"
        numbers = [first.seq, *(seen.get_nowait().seq for _ in range(seen.qsize()))]
        assert numbers == [event.seq for event in client.inspect.events(job.id)]
