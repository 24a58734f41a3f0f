"""A small embedded installation for tests: record, objects, a data set of tiny pairs, the micro base, real workers.

Specs are so small that a job takes seconds; leases are short, so that a lost worker is noticed at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydantic import SecretStr

from cffa_core.data.ingest import check, write
from cffa_core.jobs.records import Dataset, Job, StoredFiles
from cffa_core.jobs.spec import GenerationSpec, JobSpec, SamplerSpec, Scheduler, TrainingSpec
from cffa_core.jobs.state import TERMINAL, JobState
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore, dataset_key
from cffa_core.storage.manifest import publish_folder
from cffa_core.storage.open import open_store
from services.worker.loop import Worker
from services.worker.supervisor import CHILD_COMMAND

OWNER = "local"
SIDE = 64
RUN_WITH_CHILD = """
import logging, sys
from cffa_core.settings import Settings
from services.worker.__main__ import run, worker_for
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
sys.exit(run(worker_for(Settings(), child_command=sys.argv[1:])))
"""
SCRIPTED_CHILD = str(Path(__file__).with_name("scripted_child.py"))


def scripted(numerics_key: str = "cpu/test/torch-0/diffusers-0/fp32/threads-1/batch-1") -> list[str]:
    """Command of a child that acts on the seed of its job; see ``scripted_child``."""
    return [sys.executable, SCRIPTED_CHILD, numerics_key]


def write_pairs(folder: Path, count: int = 4) -> Path:
    """``cf/NAME.png`` and ``fa/NAME.png``: blurred discs with a few dark (CF) or bright (FA) lines."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    inside = (rows - 31.5) ** 2 + (columns - 31.5) ** 2 < 30**2
    for number in range(count):
        lines = np.sin((rows * (number + 1) + columns * 3) / 7.0) > 0.9
        cf = np.where(lines[..., None], [120, 40, 20], [200, 110, 60]) * inside[..., None]
        fa = np.where(lines, 230, 90) * inside
        for name, pixels in (("cf", cf), ("fa", fa)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"p{number}.png")
    return folder


@contextmanager
def running_worker(worker: Worker) -> Iterator[Worker]:
    """``worker`` at work on a thread of this process."""
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        yield worker
    finally:
        worker.stop()
        thread.join()


class World:
    """One home folder and what can be done with it."""

    def __init__(self, home: Path, models_dir: Path, **changes: Any) -> None:
        values: dict[str, Any] = {
            "home": home,
            "models_dir": models_dir,
            "lease_seconds": 8.0,
            "renew_seconds": 0.5,
            "poll_seconds": 0.1,
            "sweep_seconds": 0.3,
            "cancel_grace_seconds": 10.0,
            "stall_seconds": 60.0,
            "device": "cpu",
            "threads": 1,
        }
        self.settings = Settings(**(values | changes))
        self.store = JobStore(self.settings.record_url)
        self.store.migrate()
        self.objects = self.open_objects()
        self.workers: list[subprocess.Popen[bytes]] = []

    def open_objects(self) -> ObjectStore:
        """The object store of this installation."""
        return open_store(self.settings)

    def add_dataset(self, count: int = 4, source: Path | None = None) -> Dataset:
        """Check tiny pairs (or those of ``source``) and take them in, as the API does."""
        dataset_id = self.store.new_id("ds")
        source = source or write_pairs(self.settings.home / "raw" / dataset_id, count)
        folder = self.settings.home / "checked" / dataset_id
        checked = check(source)
        index = write(checked, folder)
        stored = publish_folder(self.objects, folder, lambda name: dataset_key(dataset_id, name))
        return self.store.add_dataset(
            OWNER,
            dataset_id=dataset_id,
            name="tiny pairs",
            digest=index["digest"],
            pairs=len(index["pairs"]),
            report=checked.report(),
            stored=stored,
        )

    def add_unread_dataset(self) -> Dataset:
        """A data set without files, for children that do not read it."""
        return self.store.add_dataset(
            OWNER,
            dataset_id=self.store.new_id("ds"),
            name="nothing",
            digest="0" * 64,
            pairs=2,
            report={},
            stored=StoredFiles(),
        )

    def training(self, dataset: Dataset, **changes: Any) -> Job:
        """Post a small training job."""
        values: dict[str, Any] = {
            "dataset_id": dataset.id,
            "base": "micro",
            "resolution": SIDE,
            "steps": 6,
            "checkpoint_every": 2,
            "validate_every": 3,
            "preview_every": 6,
            "preview_pairs": 1,
            "preview": SamplerSpec(steps=2),
            "holdout": 0.25,
            "learning_rate": 1e-2,
        }
        return self.post(TrainingSpec(**(values | changes)))

    def generation(self, model_id: str, **changes: Any) -> Job:
        """Post a small generation job: 5 pairs in 3 parts, a sampler that draws noise at every step."""
        values: dict[str, Any] = {
            "model_id": model_id,
            "resolution": SIDE,
            "count": 5,
            "part_size": 2,
            "batch_size": 2,
            "sampler": SamplerSpec(scheduler=Scheduler.DDPM, steps=3),
        }
        return self.post(GenerationSpec(**(values | changes)))

    def post(self, spec: JobSpec) -> Job:
        """Post a job."""
        job, _ = self.store.create_job(OWNER, spec)
        return job

    def job(self, job_id: str) -> Job:
        """The job as of now."""
        return self.store.get_job(OWNER, job_id)

    def events(self, job_id: str, kind: str) -> list[dict[str, Any]]:
        """Data of a job's events of one type."""
        return [event.data for event in self.store.events(OWNER, job_id, limit=1000) if event.type == kind]

    @property
    def environment(self) -> dict[str, str]:
        """Environment that gives a worker process these settings."""
        own = {}
        for name in type(self.settings).model_fields:
            value = getattr(self.settings, name)
            plain = value.get_secret_value() if isinstance(value, SecretStr) else value
            if plain not in (None, ""):
                own[f"CFFA_{name.upper()}"] = str(plain)
        return {**os.environ, **own}

    def start_worker(self, child_command: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
        """A worker process of its own, with the real child unless another command is given."""
        run = ["-m", "services.worker"]
        if child_command is not None:
            run = ["-c", RUN_WITH_CHILD, *child_command]
        worker = subprocess.Popen([sys.executable, *run], env=self.environment, start_new_session=True)
        self.workers.append(worker)
        return worker

    @contextmanager
    def worker_thread(self, child_command: Sequence[str] = CHILD_COMMAND) -> Iterator[Worker]:
        """A worker in a thread of this process; the shortest way to a running one."""
        with running_worker(Worker(self.settings, child_command=child_command)) as worker:
            yield worker

    def wait(self, what: Callable[[], Any], seconds: float = 60.0, why: str = "") -> Any:
        """Poll until ``what()`` is true; returns it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = what()
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"did not happen within {seconds:g} s: {why or what}")

    def wait_terminal(self, job_id: str, seconds: float = 120.0) -> Job:
        """Wait until a job is over."""
        self.wait(lambda: self.job(job_id).state in TERMINAL, seconds, f"end of {job_id}: {self.job(job_id)}")
        return self.job(job_id)

    def wait_state(self, job_id: str, state: JobState, seconds: float = 60.0) -> Job:
        """Wait until a job is in ``state``."""
        self.wait(lambda: self.job(job_id).state is state, seconds, f"{job_id} becoming {state}")
        return self.job(job_id)

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGCONT)
                worker.kill()
            worker.wait()
        self.store.close()


def child_pids(pid: int) -> list[int]:
    """Processes started by ``pid``."""
    return [int(text) for path in Path(f"/proc/{pid}/task").glob("*/children") for text in path.read_text().split()]
