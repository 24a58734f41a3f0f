"""Vessels as ridges: the maps on which CF and FA can be compared although their contrast is reversed.

Vessels are dark in CF's green channel and bright in FA; Sato's filter (Sato et al. 1998) answers to both, given
the sign. Nothing here knows of pairs.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt
from skimage.filters import sato

from cffa_core.data.contracts import Mask

Map = npt.NDArray[np.float32]

REFERENCE_SIDE = 512  # sizes below are pixels of an image of this side and grow with it
SIGMAS = (1.5, 2.5, 3.5)
RIM = 10.0  # the aperture's edge is a ridge itself; this much of the field of view is left out
FILL_SIGMA = 8.0
VESSEL_FRACTION = 0.12


def unit_of(shape: tuple[int, ...]) -> float:
    """Pixels of an image of this shape per pixel of a 512-pixel image."""
    return max(shape[:2]) / REFERENCE_SIDE


def interior(valid: Mask) -> Mask:
    """The field of view without its rim, and without the rim of the image."""
    radius = max(1, round(RIM * unit_of(valid.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    padded = np.pad(valid.astype(np.uint8), radius)
    return np.asarray(cv2.erode(padded, disc)[radius:-radius, radius:-radius] > 0)


def filled(grey: npt.NDArray[np.uint8], valid: Mask) -> Map:
    """The image with what was not seen replaced by the mean of what was seen nearby, so that no step is left."""
    seen = valid.astype(np.float32)
    image = grey.astype(np.float32)
    sigma = FILL_SIGMA * unit_of(grey.shape)
    mean = cv2.GaussianBlur(image * seen, (0, 0), sigma) / np.maximum(cv2.GaussianBlur(seen, (0, 0), sigma), 1e-3)
    return np.where(valid, image, mean).astype(np.float32)


def ridge_map(image: Map, *, dark: bool) -> Map:
    """Strength of dark or bright ridges (H, W), >= 0, over vessel widths that grow with the image's side."""
    sigmas = [sigma * unit_of(image.shape) for sigma in SIGMAS]
    return np.asarray(sato(image, sigmas=sigmas, black_ridges=dark), dtype=np.float32)


def vessels(ridges: Map, field: Mask) -> Mask:
    """The strongest 12 % of the ridges inside ``field``: about the share of a retina that vessels cover."""
    if not field.any():
        return np.zeros_like(field)
    inside = ridges[field]
    return np.asarray(field & (ridges >= np.quantile(inside, 1 - VESSEL_FRACTION)) & (ridges > 0))
