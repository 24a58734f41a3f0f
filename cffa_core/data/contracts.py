"""The values that pass between the parts of the data check: limits, one checked pair, one pair's pixels.

Plain frozen dataclasses, torch-free; who makes them is ``ingest``, who reads them are ``pairs`` and the evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Registration = Literal["given", "homography", "affine", "auto"]
Layout = Literal["folders", "cases", "csv", "unknown"]

# Masks that a data set may bring. Vessels: the folders below masks/ in which they are looked for, and what each is
# called here; where one pair has them, all must. Others are called as their folder is, and any pair may lack one.
MASK_FOLDERS = {"vessel": "vessel", "vessels": "vessel"}
MASK_NAME = re.compile(r"[a-z0-9_]{1,32}")

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Limits:
    """What a source may hold. Sizes are bytes, sides and counts of pixels, times seconds."""

    max_members: int = 20_000
    max_total_bytes: int = 32 * 2**30
    max_member_bytes: int = 512 * 2**20
    max_ratio: float = 200.0
    max_pixels: int = 64_000_000
    max_total_pixels: int = 40_000_000_000
    max_text_bytes: int = 2**20
    max_captions_bytes: int = 32 * 2**20
    min_side: int = 32
    decode_seconds: int = 60


@dataclass(frozen=True)
class CheckedPair:
    """One pair that passed: CF and FA of the same eye on one pixel grid of ``width`` x ``height``.

    ``residual_px`` is the root mean square distance of the good landmarks after registration, in CF pixels; None if
    the pair came registered. ``masks`` names the masks that came with it. ``patient`` is None where nobody told it.
    ``original_name`` is what the pair was called where that is no safe name.
    """

    name: str
    eye: str
    width: int
    height: int
    registration: Registration
    residual_px: float | None
    masks: tuple[str, ...] = ()
    patient: str | None = None
    original_name: str | None = None

    @property
    def called(self) -> str:
        """Its name as whoever sent it knows it."""
        return self.original_name or self.name


def undivided(eye: str, patient: str | None) -> str:
    """A name for what no split cuts in two: all eyes of the patient if it is known, else the eye.

    An eye and a patient that are called alike have two names.
    """
    return eye if patient is None else f"patient\x1f{patient}"


@dataclass(frozen=True)
class PairImages:
    """Pixels of one pair: ``cf`` (H, W, 3) u8 RGB, ``fa`` (H, W) u8, ``valid_cf`` and ``valid_fa`` (H, W) bool.

    A valid mask is the area that the modality saw (its field of view); all are on CF's pixel grid. ``masks`` (H, W)
    bool are those that came with the pair, by name: ``vessel``, ``disc`` ...
    """

    cf: Bytes
    fa: Bytes
    valid_cf: Mask
    valid_fa: Mask
    masks: Mapping[str, Mask] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Memory that the arrays take."""
        arrays = (self.cf, self.fa, self.valid_cf, self.valid_fa, *self.masks.values())
        return sum(array.nbytes for array in arrays)
