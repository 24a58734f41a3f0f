"""Train a pair method on a data set: one readable script over the parts.

Step k draws its random numbers from (job seed, k) alone, validation and previews from seeds of their own, and a
checkpoint holds everything, so that a run that was stopped and resumed ends with the bytes of one that was not (on a
CPU); nor does it matter when its owner asked for a checkpoint or a sample. Knows nothing of jobs, leases or storage: it
has a :class:`JobContext`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cffa_core.data.captions import Caption
from cffa_core.data.pairs import PairSet, load_pairs
from cffa_core.data.token_masks import masks_to_load
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.spec import TrainSettings
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.caption_text import captions_of
from cffa_core.recipes.novelty import write_training_pairs
from cffa_core.recipes.training_run import TrainingRun


def run_training(
    settings: TrainSettings,
    dataset: Path,
    base: str | Path,
    out: Path,
    context: JobContext,
    *,
    device: str = "cpu",
    models_dir: Path | None = None,
    lpips_weights: Path | None = None,
) -> dict[str, Any]:
    """Train on a data set (checked folder, raw folder or zip) and return the card of ``out/best_checkpoint``.

    Leaves ``training_log`` and ``validation_log`` (.txt and .jsonl), ``step_XXXXXX_random_pairs/``,
    ``latest_checkpoints/`` (three), ``best_checkpoint/`` and, beside the model, ``novelty.safetensors`` (thumbnails of
    the training pairs, see `recipes.novelty`) in ``out``; resumes from ``context.latest_checkpoint()``.
    ``lpips_weights`` is the file that ``loss.lpips_lambda > 0`` needs (`diffusion.perceptual`).
    Raises ``ModelUnavailable``, ``InvalidDataset``, ``NotEnoughData``, ``TrainingDiverged``, ``Cancelled``, and
    ``Conflict`` if the checkpoint belongs to other settings, data, base or LPIPS weights.
    """
    context.progress("loading", 0, settings.steps)
    loaded = load_base(base, device=device, dtype=settings.precision, models_dir=models_dir)
    masks = masks_to_load(settings.tokens)
    pairs = load_pairs(dataset, settings.resolution, settings.crop_to_common, masks=masks)
    captions = captions_of(settings, dataset, [pair.name for pair in pairs])
    return train_pairs(settings, pairs, loaded, out, context, lpips_weights=lpips_weights, captions=captions)


def train_pairs(
    settings: TrainSettings,
    pairs: PairSet,
    base: Base,
    out: Path,
    context: JobContext,
    *,
    lpips_weights: Path | None = None,
    captions: Mapping[str, Caption] | None = None,
) -> dict[str, Any]:
    """As :func:`run_training`, with data, base and captions already loaded."""
    run = TrainingRun(settings, pairs, base, out, context, lpips_weights, captions)
    run.start()
    while run.step < settings.steps:
        run.train_step()
        last = run.step == settings.steps
        if last or run.step % settings.validate_every == 0:
            run.validate()
        if settings.preview_pairs and (last or run.step % settings.preview_every == 0):
            run.preview()
        asked = context.wishes()
        if asked or last or run.step % settings.checkpoint_every == 0:
            run.checkpoint(with_sample="sample" in asked)
    write_training_pairs(run.train, out)
    return run.card()
