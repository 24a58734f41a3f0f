"""A running API with something in it: a data set, a model, jobs in every stage; with keys or without."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from cffa_core.jobs.spec import Kind
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.open import open_store
from services.client.servers import Servers
from tests.api.driving import Worker, captions, good_upload, png
from tests.api.test_edits import make_part as make_edited_part

KEY = "only-for-an-api-that-is-being-fuzzed-on-loopback"
IDS = "CFFA_FUZZ_IDS"


@dataclass(frozen=True)
class Target:
    """Where to send requests, the key that opens it (empty: none is asked for), and ids that exist, by parameter."""

    url: str
    key: str
    ids: dict[str, list[str]]
    logs: Path


@contextmanager
def target(home: Path, *, keyed: bool) -> Iterator[Target]:
    """Start an API below ``home``, fill it, and yield it; ends it afterwards."""
    environment = {
        "CFFA_RATE_LIMIT_PER_MINUTE": "0",
        "CFFA_RATE_LIMIT_POSTS_PER_MINUTE": "0",
        "CFFA_MAX_UPLOAD_BYTES": str(4 << 20),
        "CFFA_BOOTSTRAP_KEY": KEY if keyed else "",
        "CFFA_REQUIRE_KEYS": str(keyed).lower(),
        "CFFA_KEY_SECRET": "s" * 40,
        # What data sets are imported from and web hooks are sent to is nothing that answers.
        "no_proxy": "*",
    }
    with Servers(home, workers=0, logs=home / "logs", environment=environment) as servers:
        servers.wait_ready()
        key = KEY if keyed else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(base_url=servers.url, headers=headers, timeout=60.0) as http:
            yield Target(servers.url, key, _filled(http, Settings(home=home), home / "worker"), home / "logs")


def _filled(http: httpx.Client, settings: Settings, folder: Path) -> dict[str, list[str]]:
    """Take a data set in, train a model, make pairs, leave jobs in other states; ids by path parameter."""

    def post(path: str, **body: object) -> str:
        answer = http.post(path, json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    said = good_upload(3, captions("m000", "m001", "m002"))
    files = {"file": ("a.zip", said, "application/zip")}
    dataset = http.post("/v1/datasets", files=files, data={"name": "A"}).json()["id"]
    store = JobStore(settings.record_url)
    worker = Worker(store, open_store(settings), folder)
    trained = post("/v1/training-jobs", dataset_id=dataset, steps=2)
    model = worker.train()
    done = post("/v1/generation-jobs", model_id=model, count=3, part_size=2)
    for _ in range(3):
        worker.make_part()
    running = post("/v1/generation-jobs", model_id=model, count=5, part_size=2)
    worker.claim(Kind.GENERATION)
    queued = post("/v1/generation-jobs", model_id=model, count=4)
    paused = post("/v1/generation-jobs", model_id=model, count=4)
    http.post(f"/v1/jobs/{paused}:pause")
    canceled = post("/v1/evaluation-jobs", generation_job_id=done, reference_dataset_id=dataset)
    http.post(f"/v1/jobs/{canceled}:cancel")
    attention = post("/v1/attention-jobs", model_id=model)
    worker.compute(Kind.ATTENTION, {"report.json": b"{}", "overlays/cf/a.png": png(1)})
    post("/v1/captioned-training-jobs", dataset_id=dataset, steps=2)
    captioned = worker.train(Kind.CAPTIONED_TRAINING)
    edited = post("/v1/edit-jobs", dataset_id=dataset, edits=[{"text": "disc"}], part_size=2)
    make_edited_part(worker)
    store.close()
    jobs = [edited, done, running, trained, queued, paused, canceled, attention]
    return {"job_id": jobs, "dataset_id": [dataset], "model_id": [model, captioned]}


def known_ids() -> dict[str, list[str]]:
    """What :class:`Target` found, in the process of the fuzzer."""
    found: dict[str, list[str]] = json.loads(os.environ[IDS])
    return found
