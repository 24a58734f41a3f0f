"""The :class:`cffa_core.jobs.context.JobContext` that recipes get inside a worker's child.

Progress and metrics become messages, at most two a second; parts and checkpoints become stored objects under keys that
carry the attempt. A checkpoint counts only once the supervisor has answered that the record points to it. Nothing here
reads or writes the record.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cffa_core.errors import Cancelled, CffaError, CorruptArtifact, LeaseLost, NotFound
from cffa_core.jobs.records import StoredFiles, Wish
from cffa_core.storage.base import ObjectStore, checkpoint_key, part_key
from cffa_core.storage.manifest import publish_folder
from cffa_core.tracing import Stages
from services.worker.channel import Channel
from services.worker.protocol import Answer, Beat, CheckpointSaved, WorkOrder
from services.worker.scratch import fetch_each

BEAT_SECONDS = 0.5
METRICS_PER_BEAT = 500

log = logging.getLogger("cffa.child")


class UnitContext:
    """One attempt at one unit, as its recipe sees it. ``published`` are the files of :meth:`save_part`, by name;
    ``stages`` are the spans of its stages, to be closed with the unit."""

    def __init__(self, channel: Channel, objects: ObjectStore, order: WorkOrder) -> None:
        self.published = StoredFiles()
        self.stages = Stages()
        self._channel = channel
        self._objects = objects
        self._order = order
        self._beat = Beat(steps=0, stage="starting", current=0, total=0)
        self._metrics: list[tuple[int, dict[str, float]]] = []
        self._sent = 0.0

    def progress(self, stage: str, current: int, total: int) -> None:
        """Count a step, tell the supervisor now and then, and leave the unit if that was asked for."""
        self.stages.enter(stage)
        fresh = stage != self._beat.stage or current >= total
        self._beat = Beat(steps=self._beat.steps + 1, stage=stage, current=current, total=total)
        if fresh or time.monotonic() - self._sent >= BEAT_SECONDS or len(self._metrics) >= METRICS_PER_BEAT:
            self.flush()
        if self._channel.stop_requested:
            self.flush()
            raise Cancelled("the job is being cancelled or paused, or its worker is shutting down")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Keep the metrics of a step for the next message."""
        self._metrics.append((step, dict(values)))

    def flush(self) -> None:
        """Send what is kept, now."""
        self._channel.send(self._beat.model_copy(update={"metrics": tuple(self._metrics), "gpu_memory": gpu_memory()}))
        self._metrics.clear()
        self._sent = time.monotonic()

    def save_part(self, index: int, folder: Path) -> None:
        """Store the files below ``folder``; the record points to them when the unit is committed."""
        order = self._order
        stored = publish_folder(self._objects, folder, lambda name: part_key(order.job_id, index, order.attempt, name))
        self.published = StoredFiles({**self.published.files, **stored.files})

    def save_checkpoint(self, step: int, folder: Path) -> None:
        """Store the files below ``folder`` and wait until the record points to them.

        Raises :class:`LeaseLost` if the record refused them: a newer attempt owns the unit.
        """
        order = self._order
        self.flush()
        stored = publish_folder(
            self._objects, folder, lambda name: checkpoint_key(order.job_id, step, order.attempt, name)
        )
        self._channel.send(CheckpointSaved(step=step, stored=stored))
        answer: Answer = self._channel.answer()
        if not answer.accepted:
            raise LeaseLost(f"the checkpoint of step {step} was refused: this attempt no longer owns the unit")
        for key in answer.superseded:
            self._objects.delete(key)

    def wishes(self) -> frozenset[Wish]:
        """What the job's owner asked for since the last call."""
        return self._channel.take_wishes()

    def latest_checkpoint(self) -> Path | None:
        """Fetch and verify the newest recorded checkpoint whose bytes are intact.

        A damaged one costs the steps since the one before it; raises ``CorruptArtifact`` if none of them is good.
        """
        damaged: CffaError | None = None
        for step, stored in self._order.checkpoints:
            folder = Path(self._order.folder) / f"checkpoint-{step:08d}"
            folder.mkdir(exist_ok=True)
            try:
                fetch_each(self._objects, stored, folder, lambda done, total: self.progress("checkpoint", done, total))
            except (CorruptArtifact, NotFound) as error:
                log.warning("the checkpoint of step %d is damaged: %s", step, error.message)
                damaged = damaged or error
            else:
                return folder
        if damaged is not None:
            raise CorruptArtifact(f"no checkpoint of the job is intact; the newest: {damaged.message}") from damaged
        return None


def gpu_memory() -> int:
    """Bytes that this process has reserved on its GPU; 0 without one. Imports nothing: a unit may not compute."""
    torch = sys.modules.get("torch")
    # Another thread may be importing it just now.
    cuda = getattr(torch, "cuda", None)
    if cuda is None or not hasattr(cuda, "is_initialized") or not cuda.is_initialized():
        return 0
    return int(cuda.memory_reserved())
