"""A cluster for tests of the Celery workers: a real Redis, SQLite as the record, a local folder instead of S3.

What is tested here is delivery; record and object store are tested on their own servers elsewhere. Each installation
has a Redis database of its own, so that tests may share one server and flush it.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from cffa_core.jobs.records import Job
from cffa_core.jobs.spec import Kind
from cffa_core.settings import Settings
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.open import open_local
from services.worker.outbox import BROKER_ERRORS, Outbox
from services.worker.tasks import make_app
from tests.worker.scripted_child import Act
from tests.worker.world import RUN_WITH_CHILD, World, scripted

_databases = itertools.cycle(range(1, 16))
RUN_WATCHED = """
import logging, sys
from cffa_core.settings import Settings
from services.worker.__main__ import run
from services.worker.cluster import ClusterWorker
from services.worker.watch import Patience
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
sys.exit(run(ClusterWorker(Settings(), child_command=sys.argv[1:], patience={patience!r})))
"""


def local_child() -> list[str]:
    """Command of the scripted child that stores its objects in the home folder."""
    return [*scripted(), "local"]


class ClusterWorld(World):
    """One installation behind the broker at ``redis_url``; idle workers poll so rarely that only messages wake them."""

    def __init__(self, home: Path, models_dir: Path, redis_port: int, **changes: Any) -> None:
        values: dict[str, Any] = {
            "mode": "cluster",
            "database_url": f"sqlite:///{(home / 'record.sqlite').resolve()}",
            "broker_url": f"redis://127.0.0.1:{redis_port}/{next(_databases)}",
            "s3_endpoint": "http://127.0.0.1:9",
            "s3_access_key": "cffa",
            "s3_secret_key": "only-for-servers-on-loopback",
            "poll_seconds": 600.0,
            "sweep_seconds": 600.0,
        }
        home.mkdir(parents=True, exist_ok=True)
        super().__init__(home, models_dir, **(values | changes))
        self.redis = redis.Redis.from_url(self.settings.queue_url, decode_responses=True)
        self._app = make_app(self.settings)
        self._outbox = Outbox(self._app, "none")
        self.model_id = ""

    def open_objects(self) -> ObjectStore:
        """A folder."""
        return open_local(Settings(**(self.settings.model_dump() | {"mode": "embedded"})))

    def start_cluster_worker(
        self, *, script: str = RUN_WITH_CHILD, child: Sequence[str] | None = None, **changes: Any
    ) -> subprocess.Popen[bytes]:
        """A worker process with the scripted child; its log goes to ``worker-N.log``."""
        extra = {f"CFFA_{name.upper()}": str(value) for name, value in changes.items()}
        with self.log_of(len(self.workers)).open("wb") as file:
            worker = subprocess.Popen(
                [sys.executable, "-c", script, *(child or local_child())],
                env={**self.environment, **extra},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.workers.append(worker)
        return worker

    def log_of(self, number: int) -> Path:
        """Log file of the worker started as the ``number``-th."""
        return self.settings.home / f"worker-{number}.log"

    def logs(self) -> str:
        """All that the workers said."""
        return "\n".join(self.log_of(number).read_text() for number in range(len(self.workers)))

    def wait_listening(self, count: int, seconds: float = 60.0) -> None:
        """Wait until so many workers answer through the broker."""
        self.wait(lambda: len(self.ping(count)) == count, seconds, f"{count} workers to listen")

    def ping(self, count: int) -> set[str]:
        """Celery names of the workers that answer, up to ``count`` of them; none while the broker is away."""
        try:
            replies = self.control("ping", reply=True, timeout=1.0, limit=count)
        except BROKER_ERRORS:
            return set()
        return {name for reply in replies for name in reply}

    def control(self, command: str, **options: Any) -> list[dict[str, Any]]:
        """Send a command of Celery's remote control to all workers."""
        with self._app.connection_for_write() as connection:
            return self._app.control.broadcast(command, connection=connection, **options) or []

    def ask(self, command: str, name: str) -> Any:
        """What one worker answers to a command of Celery's remote control."""
        (reply,) = self.control(command, reply=True, timeout=10.0, destination=[name])
        return reply[name]

    def inspect(self, command: str, name: str) -> dict[str, Any]:
        """What ``celery inspect COMMAND`` prints of one worker."""
        done = self.celery("inspect", command, "--json", "--destination", name, "--timeout", "10")
        assert done.returncode == 0, done.stdout + done.stderr
        return dict(json.loads(done.stdout))

    def celery(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run Celery's command line on this cluster."""
        return subprocess.run(
            [sys.executable, "-m", "celery", "-A", "services.worker.celery_app", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def announce(self, kind: Kind, times: int = 1) -> None:
        """Publish messages as the API does."""
        self._outbox.wake(kind, times)

    def queued(self, kind: Kind) -> int:
        """Messages in the queue of a kind."""
        return self._outbox.queued(kind)

    def act(self, act: Act) -> Job:
        """Post a training job that acts as told; nobody is woken."""
        return self.training(self.add_unread_dataset(), seed=int(act))

    def parts(self, count: int, act: Act = Act.FINISH) -> Job:
        """Post a generation job of so many parts; nobody is woken. Needs :attr:`model_id`."""
        return self.generation(self.model_id, count=count, part_size=1, seed=int(act))

    def train_model(self) -> None:
        """Let a worker that listens finish a training job, and keep its model."""
        job = self.act(Act.FINISH)
        self.announce(Kind.TRAINING)
        finished = self.wait_terminal(job.id)
        assert finished.result is not None, finished.error
        self.model_id = finished.result["model_id"]

    def attempts(self, job_id: str) -> list[int]:
        """The attempt number of every claim of a job's units."""
        return [claim["attempt"] for claim in self.events(job_id, "claimed")]

    def close(self) -> None:
        """End all workers."""
        super().close()
        self._outbox.close()
        self.redis.close()
