"""How fast is work taken, and do two workers halve a job's time? Claims from long queues; one worker against two.

Claims: a record with 10,000 queued jobs against one with 100, in turn, on SQLite and PostgreSQL. Workers: Celery
workers on a real Redis whose child waits a fixed time per part, as for a device, so that the cores of this machine do
not decide; one and two workers in turn.

    python -m benchmarks.delivery [--only claim workers]

writes benchmarks/results/delivery.json. Goal: two workers take at most 0.6 of one worker's time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cffa_core.jobs import lifecycle
from cffa_core.jobs.database import Database
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import GenerationSpec, Kind
from cffa_core.jobs.store import JobStore
from tests.faults.campaign import machine
from tests.faults.place import Place
from tests.faults.timed_child import timed
from tests.faults.worlds import FaultCluster
from tests.record_cases import OWNER, trained_model

RESULTS = Path(__file__).resolve().parent / "results" / "delivery.json"
OWNERS = 4
JOBS_PER_TRANSACTION = 500
SHORT_QUEUE = 100


def main() -> None:
    """Run what is asked for and add it to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["claim", "workers"], default=["claim", "workers"])
    parser.add_argument("--queued", type=int, default=10_000, help="jobs in the long queue")
    parser.add_argument("--claims", type=int, default=200, help="claims measured in each queue")
    parser.add_argument("--parts", type=int, default=40, help="parts of a job of the workers")
    parser.add_argument("--part-seconds", type=float, default=0.5, help="what the stand-in for a device takes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    found |= {"question": "how fast is work taken, and do two workers halve a job's time?", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(Place(Path(folder))) as place:
        if "claim" in options.only:
            found["claim"] = {
                "sqlite": _claims(options, f"sqlite:///{folder}/long.sqlite", f"sqlite:///{folder}/short.sqlite"),
                "postgresql": _claims(options, place.new_database(), place.new_database()),
            }
        if "workers" in options.only:
            found["workers"] = _workers(options, place)
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


# --- claims -----------------------------------------------------------------------------------------------------------


def _claims(options: argparse.Namespace, long_url: str, short_url: str) -> dict[str, Any]:
    """Latency of a claim in a long and in a short queue; each claimed unit is given back, so that both stay long."""
    with _queue(long_url, options.queued) as long, _queue(short_url, SHORT_QUEUE) as short:
        seconds: dict[str, list[float]] = {"long": [], "short": []}
        for _ in range(options.claims):
            for name, store in (("long", long), ("short", short)):
                began = time.perf_counter()
                claim = store.claim("w", [Kind.GENERATION], lease_seconds=60.0)
                seconds[name].append(time.perf_counter() - began)
                assert claim is not None
                store.release(claim)
    return {
        f"{options.queued}_jobs": _percentiles(seconds["long"]),
        f"{SHORT_QUEUE}_jobs": _percentiles(seconds["short"]),
        "ratio_of_medians": round(statistics.median(seconds["long"]) / statistics.median(seconds["short"]), 2),
    }


@contextlib.contextmanager
def _queue(url: str, jobs: int) -> Iterator[JobStore]:
    """A record in which so many one-part jobs of several owners wait."""
    store = JobStore(url)
    store.migrate()
    models = {owner: trained_model(store, owner) for owner in (f"{OWNER}-{n}" for n in range(OWNERS))}
    database = Database(url)
    owners = list(models)

    def fill(connection: Any, first: int, last: int) -> None:
        for number in range(first, last):
            owner = owners[number % OWNERS]
            spec = GenerationSpec(model_id=models[owner], count=1, seed=number)
            lifecycle.create(connection, owner, JobStore.new_id("job"), spec, 0, None)

    for first in range(0, jobs, JOBS_PER_TRANSACTION):
        last = min(jobs, first + JOBS_PER_TRANSACTION)
        database.write(partial(fill, first=first, last=last))
    database.close()
    try:
        yield store
    finally:
        store.close()


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * statistics.median(ordered), 2),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
    }


# --- workers ----------------------------------------------------------------------------------------------------------


def _workers(options: argparse.Namespace, place: Place) -> dict[str, Any]:
    """Time of one job with one and with two workers, in turn; the workers wait, the job's child starts anew."""
    place.server("redis")
    with place.cluster(lease_seconds=30.0) as one, place.cluster(lease_seconds=30.0) as two:
        for world, count in ((one, 1), (two, 2)):
            command = timed(world.settings.home / "child.log", options.part_seconds, local=True)
            for _ in range(count):
                world.start_worker(command)
            world.wait_listening(count)
        models = {id(world): world_model(world) for world in (one, two)}
        seconds: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(options.repeats):
            seconds["one"].append(_run_job(one, models[id(one)], options.parts))
            seconds["two"].append(_run_job(two, models[id(two)], options.parts))
    single, double = statistics.median(seconds["one"]), statistics.median(seconds["two"])
    return {
        "parts": options.parts,
        "seconds_per_part": options.part_seconds,
        "one_worker_seconds": [round(value, 2) for value in seconds["one"]],
        "two_workers_seconds": [round(value, 2) for value in seconds["two"]],
        "ratio": round(double / single, 3),
        "goal": 0.6,
    }


def world_model(world: FaultCluster) -> str:
    """A model, entered without waking the workers."""
    files = StoredFiles({"model.json": world.objects.put_bytes("models/adopted/model.json", b"{}")})
    return world.adopt_model(files)


def _run_job(world: FaultCluster, model_id: str, parts: int) -> float:
    began = time.perf_counter()
    job = world.generation(model_id, count=parts, part_size=1)
    world.announce(Kind.GENERATION, 2)
    world.wait_terminal(job.id, 600.0)
    took = time.perf_counter() - began
    world.assert_succeeded(job.id)
    return took


if __name__ == "__main__":
    main()
