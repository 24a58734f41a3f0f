"""Generate pairs with a trained model, one part of the grid at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cffa_core.jobs.context import JobContext
from cffa_core.jobs.spec import GenerateSettings


class PairSampler:
    """A model loaded once, ready to draw pairs."""


def load_sampler(
    settings: GenerateSettings,
    model: Path,
    base: str | Path,
    device: str = "cpu",
    *,
    models_dir: Path | None = None,
) -> PairSampler:
    """Load base and model once."""
    raise NotImplementedError


def generate_part(
    sampler: PairSampler, settings: GenerateSettings, part: int, out: Path, context: JobContext
) -> dict[str, Any]:
    """Write ``out/cf/000017.png``, ``out/fa/000017.png`` and ``out/part.json``; return the content of part.json."""
    raise NotImplementedError
