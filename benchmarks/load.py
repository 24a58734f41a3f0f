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
import gc
import itertools
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from benchmarks.service import model_of_two_steps
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec
from services.client.client import CffaClient
from services.client.servers import Servers
from tests.faults.campaign import machine

RESULTS = Path(__file__).resolve().parent / "results" / "load.json"
GOAL_MS = 250.0
# Enough for 200 requests a second that take a quarter of a second each.
CONNECTIONS = 64


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
        gc.collect()
        gc.freeze()  # a full collection here would be taken for a server that does not answer
        began = time.monotonic()
        seen = asyncio.run(_load(servers.url, job_id, options))
        took = time.monotonic() - began
        cpu = _cpu_seconds(api) - cpu
        made = client.job(job_id).counts.generated - made
        history = [event.seq for event in client.inspect.events(job_id)]
    return _result(options, seen, history, took=took, cpu=cpu, made=made)


def _running_job(client: CffaClient, options: argparse.Namespace, data: Path) -> str:
    """A generation job whose first part is done, so that it is known to run."""
    model_id = model_of_two_steps(client, options, data)
    settings = GenerateSettings(
        count=options.pairs,
        resolution=options.resolution,
        batch_size=1,
        part_size=2,
        sampler=SamplerSpec(steps=4),
    )
    posted = client.submit_generation(model_id, settings)
    for job in client.watch(posted.id, timeout=600):
        if job.terminal:
            raise RuntimeError(f"the job ended as {job.state} before there was any load")
        if job.counts.generated:
            break
    return posted.id


async def _load(url: str, job_id: str, options: argparse.Namespace) -> Seen:
    """Streams first, then requests at their due times, then the end of the job, which ends the streams.

    HTTP by hand over plain sockets: a client library would take more of the two cores than the service does.
    """
    seen, address = Seen(), urlsplit(url)
    assert address.hostname is not None and address.port is not None
    place = (address.hostname, address.port)
    streams = [asyncio.create_task(_stream(place, job_id, seen)) for _ in range(options.streams)]
    await asyncio.sleep(2.0)
    job = f"/v1/jobs/{job_id}"
    paths = itertools.cycle([job, job, "/v1/jobs?page_size=10", f"{job}/events?page_size=20", job, "/v1/queue"])
    begin = asyncio.get_running_loop().time() + 0.5
    numbers = range(round(options.rate * options.seconds))
    due = iter([(begin + number / options.rate, next(paths)) for number in numbers])
    await asyncio.gather(*(_requests(place, due, seen) for _ in range(CONNECTIONS)))
    async with httpx.AsyncClient(base_url=url, timeout=60.0) as http:
        (await http.post(f"{job}:cancel")).raise_for_status()
    await asyncio.wait(streams, timeout=90.0)
    seen.failures["stream did not end"] += sum(not stream.done() for stream in streams)
    for stream in streams:
        stream.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    return seen


async def _requests(place: tuple[str, int], due: Iterator[tuple[float, str]], seen: Seen) -> None:
    """One connection that takes the next request that is due, and the next, until there are none."""
    loop = asyncio.get_running_loop()
    reader, writer = await asyncio.open_connection(*place)
    for at, path in due:
        await asyncio.sleep(max(0.0, at - loop.time()))
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {place[0]}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            await reader.readexactly(int(length[1]) if length else 0)
            seen.statuses[int(head[9:12])] += 1
        except (OSError, EOFError) as error:
            seen.failures[type(error).__name__] += 1
            reader, writer = await asyncio.open_connection(*place)
        seen.seconds.append(loop.time() - at)
    writer.close()


async def _stream(place: tuple[str, int], job_id: str, seen: Seen) -> None:
    """Hold one live stream to its end and note the numbers of its events."""
    numbers: list[int] = []
    seen.streams.append(numbers)
    try:
        reader, writer = await asyncio.open_connection(*place)
        asked = f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nHost: {place[0]}\r\nAccept: text/event-stream\r\n\r\n"
        writer.write(asked.encode())
        head = await reader.readuntil(b"\r\n\r\n")
        seen.statuses[int(head[9:12])] += 1
        # Chunked; each event is a chunk of whole lines, so that the lines with numbers stand for themselves.
        while (line := await reader.readline()) and line != b"0\r\n":
            if line.startswith(b"id: "):
                numbers.append(int(line[4:]))
        writer.close()
    except (OSError, EOFError) as error:
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
