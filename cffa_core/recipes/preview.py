"""Preview pairs of a training run: each pair as CF and FA files, and all of them on one sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from cffa_core.methods.method import Tensors
from cffa_core.methods.pair_sampler import NewPair, PairSampler, write_png
from cffa_core.rng import derive_seed

CELL = 160


def write_previews(
    sampler: PairSampler,
    count: int,
    seed: int,
    folder: Path,
    on_step: Callable[[int, int], None],
    structures: Sequence[Tensors] = (),
) -> None:
    """Draw ``count`` pairs and write ``cf/``, ``fa/`` and ``sheet.png`` (a row per pair: CF, FA) into ``folder``.

    The seeds are the same at every step of a run, so that sheets can be compared; so are the ``structures``, one for
    each pair, where the model draws on them.
    """
    pairs: list[NewPair] = []
    indices = list(range(count))
    for start in range(0, count, sampler.batch_size):
        batch = indices[start : start + sampler.batch_size]
        seeds = [derive_seed(seed, "preview", i) for i in batch]
        pairs += sampler.draw(batch, seeds, on_step, structures[batch[0] : batch[-1] + 1])
    for pair in pairs:
        pair.save(folder)
    write_png(folder, "sheet.png", sheet(pairs))


def sheet(pairs: Sequence[NewPair]) -> NDArray[np.uint8]:
    """One picture ``(rows * 160, columns * 160, 3)``: two pairs per row, each as CF and FA."""
    cells = [np.hstack([_cell(image) for image in (pair.cf, pair.fa) if image is not None]) for pair in pairs]
    if len(cells) % 2:
        cells.append(np.zeros_like(cells[0]))
    rows = [np.hstack(cells[i : i + 2]) for i in range(0, len(cells), 2)]
    return np.vstack(rows)


def _cell(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    colour = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
    return np.asarray(cv2.resize(colour, (CELL, CELL), interpolation=cv2.INTER_AREA), dtype=np.uint8)
