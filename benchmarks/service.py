"""What does the service cost? Posting jobs over HTTP, and the same pairs through the service and through the library.

Submit: jobs posted to a running API, one client and eight. Overhead: a generation job of a real installation (API,
worker, child) against a fresh process that calls the library for the same pairs; both start cold, in turn.

    python -m benchmarks.service [--only submit overhead]

writes benchmarks/results/service.json. Goal: the service takes at most 3 % longer than the library.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec, TrainSettings
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.manifest import fetch_files
from cffa_core.storage.open import open_store
from services.client.client import CffaClient
from services.client.servers import Servers
from tests.faults.campaign import machine
from tests.faults.place import Place
from tests.record_cases import trained_model

RESULTS = Path(__file__).resolve().parent / "results" / "service.json"
OWNER = "local"
LIBRARY = """
import sys
import torch
torch.set_num_threads(int(sys.argv[6]))
import cffa_core as cffa
model = cffa.load_model(sys.argv[1], cffa.load_base(sys.argv[7], device=sys.argv[8]))
out, count, seed, steps = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
for pair in model.sample(count, seed=seed, steps=steps, batch_size=int(sys.argv[9]), resolution=int(sys.argv[10])):
    pair.save(out)
"""


def main() -> None:
    """Run what is asked for and add it to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["submit", "overhead"], default=["submit", "overhead"])
    parser.add_argument("--jobs", type=int, default=500, help="jobs posted per measurement")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=25, help="sampler steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    found: dict[str, Any] = json.loads(options.results.read_text()) if options.results.exists() else {}
    found |= {"question": "what does the service cost?", "machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        if "submit" in options.only:
            with contextlib.closing(Place(Path(folder))) as place:
                urls = {"sqlite": "", "postgresql": place.new_database()}
                found["submit"] = {
                    name: _submit(options, Path(folder) / f"submit-{name}", url) for name, url in urls.items()
                }
        if "overhead" in options.only:
            found["overhead"] = _overhead(options, Path(folder))
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


# --- submit -----------------------------------------------------------------------------------------------------------


def _submit(options: argparse.Namespace, home: Path, database_url: str) -> dict[str, Any]:
    """Latency and rate of ``POST /v1/generation-jobs`` with one client and with eight."""
    settings = Settings(home=home, database_url=database_url)
    store = JobStore(settings.record_url)
    store.migrate()
    body = {"model_id": trained_model(store, OWNER), "count": 64}
    store.close()
    result: dict[str, Any] = {}
    with _api(home, database_url) as url:
        for clients in (1, 8):
            seconds: list[float] = []
            each = options.jobs // clients
            threads = [threading.Thread(target=_post, args=(url, body, each, seconds)) for _ in range(clients)]
            began = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            took = time.perf_counter() - began
            if len(seconds) != each * clients:
                raise RuntimeError("a client failed; see above")
            result[f"{clients}_clients"] = _percentiles(seconds) | {"jobs_per_second": round(len(seconds) / took, 1)}
    return result


@contextlib.contextmanager
def _api(home: Path, database_url: str) -> Iterator[str]:
    """A running API of an embedded installation, without a worker."""
    environment = {"CFFA_DATABASE_URL": database_url} if database_url else {}
    with Servers(home, workers=0, environment=environment, logs=home / "logs") as servers:
        servers.wait_ready()
        yield servers.url


def _post(url: str, body: dict[str, Any], count: int, seconds: list[float]) -> None:
    with httpx.Client(base_url=url, timeout=60.0) as client:
        for _ in range(count):
            began = time.perf_counter()
            client.post("/v1/generation-jobs", json=body).raise_for_status()
            seconds.append(time.perf_counter() - began)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * statistics.median(ordered), 2),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
    }


# --- overhead ---------------------------------------------------------------------------------------------------------


def _overhead(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds for the same pairs, service and library in turn; the ratio is of the medians."""
    home, threads = folder / "home", len(os.sched_getaffinity(0))
    environment = {"CFFA_DEVICE": options.device, "CFFA_THREADS": str(threads)}
    environment |= {name: os.environ[name] for name in ("CFFA_MODELS_DIR",) if name in os.environ}
    seconds: dict[str, list[float]] = {"service": [], "library": []}
    with Servers(home, environment=environment, logs=home / "logs") as servers, CffaClient(servers.url) as client:
        servers.wait_ready()
        model_id = model_of_two_steps(client, options, folder / "data")
        model = _fetch_model(home, model_id, folder / "model")
        for number in range(options.repeats):
            settings = GenerateSettings(
                count=options.pairs,
                resolution=options.resolution,
                batch_size=options.batch_size,
                sampler=SamplerSpec(steps=options.steps),
                seed=number,
            )
            began = time.perf_counter()
            job = client.wait(client.submit_generation(model_id, settings).id)
            seconds["service"].append(time.perf_counter() - began)
            if job.state != "succeeded":
                raise RuntimeError(f"the job ended as {job.state}")
            time.sleep(15.0)  # the worker's idle child ends, so that the next job starts cold, and nobody shares cores
            began = time.perf_counter()
            out = folder / f"library-{number}"
            values = [model, out, options.pairs, number, options.steps, threads, options.base, options.device]
            values += [options.batch_size, options.resolution]
            subprocess.run([sys.executable, "-c", LIBRARY, *map(str, values)], check=True)
            seconds["library"].append(time.perf_counter() - began)
            if len(list(out.glob("cf/*.png"))) != options.pairs:
                raise RuntimeError("the library made another number of pairs")
    ratio = statistics.median(seconds["service"]) / statistics.median(seconds["library"])
    return {
        "pairs": options.pairs,
        "base": options.base,
        "resolution": options.resolution,
        "sampler_steps": options.steps,
        "device": options.device,
        "service_seconds": [round(value, 2) for value in seconds["service"]],
        "library_seconds": [round(value, 2) for value in seconds["library"]],
        "overhead_percent": round(100 * (ratio - 1), 2),
        "goal_percent": 3.0,
    }


def model_of_two_steps(client: CffaClient, options: argparse.Namespace, data: Path) -> str:
    """Id of a model trained for two steps: what it draws does not matter here."""
    write_phantoms(data, 4, 1, options.resolution)
    dataset = client.upload_dataset(data)
    settings = TrainSettings(
        base=options.base,
        resolution=options.resolution,
        steps=2,
        validate_every=2,
        checkpoint_every=2,
        preview_pairs=0,
        holdout=0.25,
    )
    job = client.wait(client.submit_training(dataset.id, settings).id)
    return client.model_of(job.id).id


def _fetch_model(home: Path, model_id: str, folder: Path) -> Path:
    """The model's folder, as the library wants it."""
    settings = Settings(home=home)
    store = JobStore(settings.record_url)
    fetch_files(open_store(settings), store.get_model(OWNER, model_id).stored, folder)
    store.close()
    return folder


if __name__ == "__main__":
    main()
