"""Does the API keep answering? Polling and live streams on the two cores on which a job runs.

A real installation (API, worker, child with one thread and a raised nice value) generates pairs, while one process
sends 200 requests a second (jobs, lists, pages of events) at their due times and holds 100 streams of the job's events.
Latency counts from the moment a request was due, so that a server that falls behind is seen to. A stream must bring
every event of the history; one that breaks off or ends before its job counts as dropped.

    python -m benchmarks.load [--seconds 30]

writes benchmarks/results/load.json. Goal: p99 under 250 ms, nothing dropped, no error.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec, TrainSettings
from services.client.client import CffaClient
from services.client.event_stream import EventLines, stream_headers
from services.client.servers import Servers
from tests.faults.campaign import machine

RESULTS = Path(__file__).resolve().parent / "results" / "load.json"
GOAL_MS = 250.0


@dataclass
class Seen:
    """What came back: seconds of each request, status codes, what went wrong, and event numbers of each stream."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    streams: list[list[int]] = field(default_factory=list)


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=int, default=200, help="requests per second")
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=4000, help="of the running job; it is cancelled at the end")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--nice", type=int, default=10, help="of the worker and its child")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = _measure(options, Path(folder))
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    environment = {
        "CFFA_THREADS": "1",
        "CFFA_RATE_LIMIT_PER_MINUTE": "0",
        "CFFA_RATE_LIMIT_POSTS_PER_MINUTE": "0",
    }
    with (
        Servers(folder / "home", environment=environment, logs=folder / "logs") as servers,
        CffaClient(servers.url) as client,
    ):
        servers.wait_ready()
        api, worker = (child.process.pid for child in servers.children if child.process is not None)
        os.setpriority(os.PRIO_PROCESS, worker, options.nice)  # before it has a child: that inherits it
        job_id = _running_job(client, options, folder / "data")
        made, cpu = client.job(job_id).counts.generated, _cpu_seconds(api)
        began = time.monotonic()
        seen = asyncio.run(_load(servers.url, job_id, options))
        took = time.monotonic() - began
        cpu = _cpu_seconds(api) - cpu
        made = client.job(job_id).counts.generated - made
        history = [event.seq for event in client.inspect.events(job_id)]
    return _result(options, seen, history, took=took, cpu=cpu, made=made)


def _running_job(client: CffaClient, options: argparse.Namespace, data: Path) -> str:
    """A generation job whose first part is done, so that it is known to run."""
    write_phantoms(data, 4, 1, options.resolution)
    training = TrainSettings(
        base=options.base,
        resolution=options.resolution,
        steps=2,
        validate_every=2,
        checkpoint_every=2,
        preview_pairs=0,
        holdout=0.25,
    )
    trained = client.wait(client.submit_training(client.upload_dataset(data).id, training).id)
    settings = GenerateSettings(
        count=options.pairs,
        resolution=options.resolution,
        batch_size=1,
        part_size=2,
        sampler=SamplerSpec(steps=4),
    )
    posted = client.submit_generation(client.model_of(trained.id).id, settings)
    for job in client.watch(posted.id, timeout=600):
        if job.terminal:
            raise RuntimeError(f"the job ended as {job.state} before there was any load")
        if job.counts.generated:
            break
    return posted.id


async def _load(url: str, job_id: str, options: argparse.Namespace) -> Seen:
    """Streams first, then requests at their due times, then the end of the job, which ends the streams."""
    seen = Seen()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.streams + 100)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=httpx.Timeout(30.0, read=60.0)) as http:
        streams = [asyncio.create_task(_stream(http, job_id, seen)) for _ in range(options.streams)]
        await asyncio.sleep(2.0)
        job = f"/v1/jobs/{job_id}"
        paths = itertools.cycle([job, job, "/v1/jobs?page_size=10", f"{job}/events?page_size=20", job, "/v1/queue"])
        begin = asyncio.get_running_loop().time() + 0.1
        requests = [
            asyncio.create_task(_request(http, next(paths), begin + number / options.rate, seen))
            for number in range(round(options.rate * options.seconds))
        ]
        await asyncio.gather(*requests)
        await http.post(f"{job}:cancel")
        await asyncio.wait(streams, timeout=90.0)
        seen.failures["stream did not end"] += sum(not stream.done() for stream in streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return seen


async def _request(http: httpx.AsyncClient, path: str, due: float, seen: Seen) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(max(0.0, due - loop.time()))
    try:
        answer = await http.get(path)
        seen.statuses[answer.status_code] += 1
    except httpx.HTTPError as error:
        seen.failures[type(error).__name__] += 1
    seen.seconds.append(loop.time() - due)


async def _stream(http: httpx.AsyncClient, job_id: str, seen: Seen) -> None:
    numbers: list[int] = []
    seen.streams.append(numbers)
    lines = EventLines()
    try:
        async with http.stream("GET", f"/v1/jobs/{job_id}/events", headers=stream_headers(0)) as answer:
            seen.statuses[answer.status_code] += 1
            numbers += [event.seq async for line in answer.aiter_lines() if (event := lines.feed(line)) is not None]
    except httpx.HTTPError as error:
        seen.failures[f"stream: {type(error).__name__}"] += 1


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def _result(
    options: argparse.Namespace, seen: Seen, history: list[int], *, took: float, cpu: float, made: int
) -> dict[str, Any]:
    ordered = sorted(seen.seconds)

    def at(share: float) -> float:
        return round(1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)

    dropped = sum(numbers != history for numbers in seen.streams)
    failures = {name: count for name, count in seen.failures.items() if count}
    bad = {str(status): count for status, count in seen.statuses.items() if status != 200}
    return {
        "question": "does the API keep answering while a job runs?",
        "machine": machine(),
        "requests": len(ordered),
        "requests_per_second": options.rate,
        "streams": options.streams,
        "seconds": options.seconds,
        "nice": options.nice,
        "p50_ms": at(0.5),
        "p95_ms": at(0.95),
        "p99_ms": at(0.99),
        "max_ms": round(1e3 * ordered[-1], 1),
        "goal_p99_ms": GOAL_MS,
        "other_statuses": bad,
        "failures": failures,
        "streams_dropped": dropped,
        "events_per_stream": len(history),
        "pairs_made_meanwhile": made,
        "api_cpu_share_of_one_core": round(cpu / took, 2),
        "reached": at(0.99) < GOAL_MS and not dropped and not failures and not bad,
    }


if __name__ == "__main__":
    main()
