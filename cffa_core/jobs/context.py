"""What a recipe may ask of the job it runs in; recipes see this and never the job store.

The worker implements it with leases and object storage, the command line with a folder and a progress bar
(:class:`FolderContext`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from cffa_core.jobs.records import Wish


class JobContext(Protocol):
    """Narrow door between a recipe and whatever runs it."""

    def progress(self, stage: str, current: int, total: int) -> None:
        """Report progress; cheap, call it every step. Counts as a sign of life.

        Raises :class:`cffa_core.errors.Cancelled` when the job is being cancelled or paused.
        """

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalar metrics of a step."""

    def save_part(self, index: int, folder: Path) -> None:
        """Publish all files below ``folder`` as part ``index``; returns after they are durable."""

    def save_checkpoint(self, step: int, folder: Path) -> None:
        """Publish all files below ``folder`` as the checkpoint of ``step``; returns after they are durable."""

    def wishes(self) -> frozenset[Wish]:
        """What the job's owner asked for since the last call, to be done now: a checkpoint, a sample."""

    def latest_checkpoint(self) -> Path | None:
        """Folder of the newest checkpoint of this job with a verified digest, or None at a first start."""


class FolderContext:
    """A :class:`JobContext` for direct runs: parts and checkpoints are folders below ``out``.

    Publishing is a rename, so a killed run leaves no half-written part; the newest ``keep`` checkpoints are kept.
    """

    def __init__(self, out: Path, on_progress: Callable[[str, int, int], None] | None = None, *, keep: int = 1) -> None:
        self.out = out
        self._on_progress = on_progress
        self._keep = keep
        self.logged: list[tuple[int, dict[str, float]]] = []

    def progress(self, stage: str, current: int, total: int) -> None:
        if self._on_progress is not None:
            self._on_progress(stage, current, total)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.logged.append((step, dict(values)))

    def save_part(self, index: int, folder: Path) -> None:
        self._publish(folder, self.out / "parts" / f"{index:05d}")

    def save_checkpoint(self, step: int, folder: Path) -> None:
        self._publish(folder, self.out / "checkpoints" / f"{step:08d}")
        for old in self._checkpoints()[: -self._keep]:
            shutil.rmtree(old)

    def wishes(self) -> frozenset[Wish]:
        return frozenset()

    def latest_checkpoint(self) -> Path | None:
        found = self._checkpoints()
        return found[-1] if found else None

    def _checkpoints(self) -> list[Path]:
        return sorted(path for path in (self.out / "checkpoints").glob("*") if path.name.isdigit())

    @staticmethod
    def _publish(source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f"{target.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(source, staging)
        shutil.rmtree(target, ignore_errors=True)
        staging.rename(target)
