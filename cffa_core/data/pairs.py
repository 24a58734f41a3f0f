"""Pairs as tensors: load a data set, split it by eye, augment both images of a pair alike.

What is a pair and which pixels are valid was decided by ``ingest``; nothing here opens an untrusted file itself, and
nothing here knows latents or losses.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import cv2
import numpy as np
import torch

from cffa_core.data.contracts import Bytes, CheckedPair, Mask, PairImages, undivided
from cffa_core.data.dataset_folder import is_dataset_folder, read_split
from cffa_core.data.ingest import open_pairs
from cffa_core.errors import InvalidDataset, Problem
from cffa_core.rng import derive_seed

DIHEDRAL_VARIANTS = 8
MIN_COMMON_SIDE = 32


@dataclass(frozen=True)
class Pair:
    """One registered pair of one eye, at one resolution.

    ``cf`` (3, H, W) and ``fa`` (1, H, W) are float32 in [-1, 1]; ``valid_cf`` and ``valid_fa`` (1, H, W) are bool: the
    area that each modality saw. ``patient`` is None if it is not known. Invalid pixels are black (-1) where padding
    made them. ``masks`` (H, W) bool are those that came with the data set, by name (``vessel``, ``disc`` ...), as far
    as they were asked for.
    """

    name: str
    eye: str
    cf: torch.Tensor
    fa: torch.Tensor
    valid_cf: torch.Tensor
    valid_fa: torch.Tensor
    masks: Mapping[str, torch.Tensor] = field(default_factory=dict)
    patient: str | None = None


class PairSet(Sequence[Pair]):
    """Pairs in order of name. ``digest`` is that of the data set they came from, also after a split.

    ``split`` are the names for train, validation and test that are locked into the data set, if there are any.
    """

    def __init__(self, pairs: Sequence[Pair], digest: str, split: Mapping[str, Collection[str]] | None = None) -> None:
        self._pairs = tuple(pairs)
        self.digest = digest
        self.split = split

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...

    @overload
    def __getitem__(self, index: slice) -> PairSet: ...

    def __getitem__(self, index: int | slice) -> Pair | PairSet:
        if isinstance(index, slice):
            return PairSet(self._pairs[index], self.digest)
        return self._pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    @property
    def eyes(self) -> tuple[str, ...]:
        """The different eyes, in order of name."""
        return tuple(sorted({pair.eye for pair in self._pairs}))

    def for_training(self, holdout: float, seed: int) -> tuple[PairSet, PairSet]:
        """Pairs to train on and pairs to validate on: by the data set's own split if it has one, else by eye.

        With a split ``holdout`` does not count, and what is for the test is in neither.
        """
        if self.split is None:
            return self.split_by_eye(holdout, seed)
        named = {part: set(self.split.get(part, ())) for part in ("train", "validation")}
        train, validation = (
            PairSet([pair for pair in self._pairs if pair.name in names], self.digest) for names in named.values()
        )
        return train, validation

    def split_by_eye(self, holdout: float, seed: int) -> tuple[PairSet, PairSet]:
        """Split into (train, held out) without cutting an eye, or a patient if it is known.

        ``holdout`` is the fraction of EYES held out, rounded, but at least one (and never all) if it is above 0 and
        there are two eyes or more; all eyes of a known patient count as one. With 0, or a single eye, nothing is held
        out. The same seed gives the same split. Raises ``ValueError`` outside [0, 1).
        """
        if not 0 <= holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), not {holdout}")
        whole = sorted({undivided(pair.eye, pair.patient) for pair in self._pairs})
        count = 0
        if holdout > 0 and len(whole) > 1:
            count = min(max(1, round(holdout * len(whole))), len(whole) - 1)
        random.Random(derive_seed(seed, "split_by_eye")).shuffle(whole)
        held = set(whole[:count])
        train = [pair for pair in self._pairs if undivided(pair.eye, pair.patient) not in held]
        out = [pair for pair in self._pairs if undivided(pair.eye, pair.patient) in held]
        return PairSet(train, self.digest), PairSet(out, self.digest)


def load_pairs(
    path: Path,
    resolution: int = 512,
    crop_to_common: bool = False,
    *,
    eye_pattern: str | None = None,
    patient_pattern: str | None = None,
    masks: Collection[str] | None = ("vessel",),
    on_progress: Callable[[int, int], None] | None = None,
) -> PairSet:
    """Load a checked data-set folder, or check a raw folder or zip in any layout and load that.

    Pairs that are not square are padded to a square with black, invalid pixels and then resized to ``resolution``.
    ``crop_to_common`` first crops each pair to the bounding box of the area that both modalities saw. ``masks`` names
    those that are kept, where a pair has them; None keeps all.
    Raises ``InvalidDataset`` with all problems, ``NotFound``, or ``CorruptArtifact`` for a damaged checked folder.
    """
    split = read_split(path) if is_dataset_folder(path) else None
    digest, _, decoded = open_pairs(
        path, eye_pattern=eye_pattern, patient_pattern=patient_pattern, on_progress=on_progress
    )
    pairs: list[Pair] = []
    apart: list[Problem] = []
    for checked, images in decoded:
        if crop_to_common:
            cropped = crop(images)
            if cropped is None:
                message = (
                    f"CF and FA share less than {MIN_COMMON_SIDE} pixels a side; leave the pair out or do not crop"
                )
                apart.append(Problem(checked.name, "no_overlap", message))
                continue
            images = cropped
        if masks is not None:
            images = replace(images, masks={name: mask for name, mask in images.masks.items() if name in masks})
        pairs.append(to_pair(checked, images, resolution))
    if apart:
        raise InvalidDataset(f"{len(apart)} pair(s) cannot be cropped to a common area", problems=tuple(apart))
    return PairSet(pairs, digest, split)


def crop(images: PairImages) -> PairImages | None:
    """Crop to the bounding box of the common valid area; None if it is smaller than 32 pixels a side."""
    common = images.valid_cf & images.valid_fa
    rows, columns = np.flatnonzero(common.any(axis=1)), np.flatnonzero(common.any(axis=0))
    if min(len(rows), len(columns)) < MIN_COMMON_SIDE:
        return None
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    masks = {name: marked[box] for name, marked in images.masks.items()}
    return PairImages(images.cf[box], images.fa[box], images.valid_cf[box], images.valid_fa[box], masks)


def square(images: PairImages, resolution: int) -> PairImages:
    """Pad to a square with black, invalid pixels, the image in the middle; resize to ``resolution``."""
    height, width = images.fa.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    rim = ((top, side - height - top), (left, side - width - left))
    shrink = resolution < side
    size = (resolution, resolution)
    smooth = cv2.INTER_AREA if shrink else cv2.INTER_CUBIC
    even = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR

    def image(pixels: Bytes) -> Bytes:
        padded = np.pad(pixels, rim + ((0, 0),) * (pixels.ndim - 2))
        return padded if side == resolution else np.asarray(cv2.resize(padded, size, interpolation=smooth))

    def mask(inside: Mask, least: float) -> Mask:
        if side == resolution:
            return np.pad(inside, rim)
        share = cv2.resize(np.pad(inside, rim).astype(np.float32), size, interpolation=even)
        return np.asarray(share > least)

    # A pixel is valid if it is made of valid pixels only, and is marked if about half of it is.
    valid = (mask(images.valid_cf, 0.999), mask(images.valid_fa, 0.999))
    return PairImages(
        image(images.cf), image(images.fa), *valid, {name: mask(marked, 0.45) for name, marked in images.masks.items()}
    )


def to_pair(checked: CheckedPair, images: PairImages, resolution: int) -> Pair:
    """Tensors of one pair at ``resolution``."""
    sized = square(images, resolution)
    return Pair(
        name=checked.name,
        eye=checked.eye,
        cf=_signed(torch.from_numpy(sized.cf.copy()).permute(2, 0, 1).contiguous()),
        fa=_signed(torch.from_numpy(sized.fa.copy())[None]),
        valid_cf=torch.from_numpy(sized.valid_cf.copy())[None],
        valid_fa=torch.from_numpy(sized.valid_fa.copy())[None],
        masks={name: torch.from_numpy(marked.copy()) for name, marked in sized.masks.items()},
        patient=checked.patient,
    )


def _signed(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes 0..255 to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def dihedral(pair: Pair, k: int) -> Pair:
    """The ``k``-th of the eight flips and rotations, alike for both images and all masks; 0 is identity."""
    return replace(
        pair,
        cf=turn(pair.cf, k),
        fa=turn(pair.fa, k),
        valid_cf=turn(pair.valid_cf, k),
        valid_fa=turn(pair.valid_fa, k),
        masks={name: turn(mask, k) for name, mask in pair.masks.items()},
    )


def turn(x: torch.Tensor, k: int) -> torch.Tensor:
    """``k % 4`` quarter turns of the last two axes, mirrored first for ``k >= 4``. ``ValueError`` if not 0..7."""
    if not 0 <= k < DIHEDRAL_VARIANTS:
        raise ValueError(f"k must be in 0..{DIHEDRAL_VARIANTS - 1}, not {k}")
    mirrored = torch.flip(x, dims=(-1,)) if k >= math.ceil(DIHEDRAL_VARIANTS / 2) else x
    return torch.rot90(mirrored, k % 4, dims=(-2, -1)).contiguous()
