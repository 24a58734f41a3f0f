"""The pairs that a model has learnt from, kept as thumbnails beside its run: new pairs are compared with them.

They never enter the model folder: they are pictures of patients, and models travel. What they are compared by is in
``evaluation.pair_scores``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from cffa_core.data.contracts import PairImages
from cffa_core.data.pairs import Pair, PairSet
from cffa_core.evaluation.pair_scores import TrainingPairs
from cffa_core.jobs.records import NOVELTY_FILE
from cffa_core.methods.method import read_card
from cffa_core.recipes.run_folder import LATEST


def write_training_pairs(pairs: PairSet, folder: Path) -> Path:
    """Write the thumbnails of ``pairs``, at the resolution they were trained at, to ``folder/novelty.safetensors``."""

    def images() -> Iterator[tuple[str, PairImages]]:
        for pair in pairs:
            yield pair.name, _pixels(pair)

    path = folder / NOVELTY_FILE
    staging = path.with_name(f".{path.name}.partial")
    TrainingPairs.of(images(), pairs.digest).write(staging)
    return staging.replace(path)


def training_pairs_beside(model: Path) -> TrainingPairs | None:
    """The training pairs of a model that still lies in the folder of its run; None where they are not to be found.

    Raises ``CorruptArtifact`` if they cannot be read.
    """
    run = model.parent.parent if model.parent.name == LATEST else model.parent
    if not (run / NOVELTY_FILE).is_file():
        return None
    found = TrainingPairs.read(run / NOVELTY_FILE)
    return found if found.dataset_digest == read_card(model)["dataset_digest"] else None


def _pixels(pair: Pair) -> PairImages:
    cf, fa = (((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8) for image in (pair.cf, pair.fa))
    return PairImages(
        cf.permute(1, 2, 0).contiguous().numpy(),
        fa[0].contiguous().numpy(),
        pair.valid_cf[0].numpy(),
        pair.valid_fa[0].numpy(),
    )
