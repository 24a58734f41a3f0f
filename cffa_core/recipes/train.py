"""Train a pair method on a data set: one readable script over the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cffa_core.jobs.context import JobContext
from cffa_core.jobs.spec import TrainSettings


def run_training(
    settings: TrainSettings,
    dataset: Path,
    base: str | Path,
    out: Path,
    context: JobContext,
    *,
    device: str = "cpu",
    models_dir: Path | None = None,
) -> dict[str, Any]:
    """Train and leave logs, previews, ``best_checkpoint/`` and ``latest_checkpoints/`` in ``out``; return model.json."""
    raise NotImplementedError
