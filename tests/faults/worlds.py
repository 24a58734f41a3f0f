"""The installations that scenarios break: the worker tests' ``World`` with log files, and the same on a cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from cffa_core.jobs.records import Job, NewModel, StoredFiles
from cffa_core.jobs.spec import Kind
from cffa_core.jobs.state import JobState
from cffa_core.storage.base import ObjectStore
from cffa_core.storage.open import open_s3
from tests.worker.cluster_world import ClusterWorld
from tests.worker.world import OWNER, RUN_WITH_CHILD, World

ROOT = Path(__file__).resolve().parents[2]


class FaultWorld(World):
    """A ``World`` whose processes write to ``home/process-N.log`` and may get further environment variables."""

    def start(self, arguments: Sequence[str], extra: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A Python process with the settings of this installation."""
        with (self.settings.home / f"process-{len(self.workers)}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**self.environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(extra or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                start_new_session=True,
            )
        self.workers.append(process)
        return process

    def start_worker(
        self, child_command: Sequence[str] | None = None, extra: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A worker process, with the real child unless another command is given."""
        if child_command is None:
            return self.start(["-m", "services.worker"], extra)
        return self.start(["-c", RUN_WITH_CHILD, *child_command], extra)

    def adopt_model(self, stored: StoredFiles | None = None, digest: str = "1" * 64) -> str:
        """Enter a model into the record as a finished training's; returns its id. Nothing else may wait."""
        self.training(self.add_unread_dataset())
        files = stored or StoredFiles({"model.json": self.objects.put_bytes("models/adopted/model.json", b"{}")})
        for new in (None, NewModel(digest=digest, card={}, stored=files)):
            claim = self.store.claim("by hand", [Kind.TRAINING], lease_seconds=60)
            assert claim is not None
            finished = self.store.commit(claim, StoredFiles(), {}, model=new)
        assert finished.result is not None
        return str(finished.result["model_id"])

    def assert_succeeded(self, job_id: str) -> Job:
        """The job, which must have succeeded with every part exactly once."""
        job = self.job(job_id)
        assert job.state is JobState.SUCCEEDED, (job.state, job.error, job.reason, self.logs())
        parts = [(part.kind, part.index) for part in self.store.parts(OWNER, job_id)]
        assert len(parts) == len(set(parts))
        return job

    def logs(self, lines: int = 30) -> str:
        """The ends of the log files, for a failure's message."""
        ends = []
        for path in sorted(self.settings.home.glob("process-*.log")):
            ends += [f"--- {path.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(ends)


class FaultCluster(FaultWorld, ClusterWorld):
    """The same behind a real Redis; the record is SQLite unless ``database_url`` is given, the objects a folder.

    Idle workers poll so rarely that only messages wake them.
    """


class WholeCluster(FaultWorld):
    """The same on a PostgreSQL, a Redis and an S3 store that ``changes`` name; the bucket is made."""

    def open_objects(self) -> ObjectStore:
        """The bucket."""
        objects = open_s3(self.settings)
        objects.ensure_bucket()
        return objects
