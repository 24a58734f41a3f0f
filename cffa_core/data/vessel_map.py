"""What a conditional model is shown of an eye: its vessels as a soft scribble, and its picture as coarse tiles.

Arrays in, arrays out. Who shows them to a network, and when, is the business of ``methods.controlnet``; the vessels on
which pairs are SCORED are the business of the evaluation, which has a filter of its own.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray
from skimage.filters import apply_hysteresis_threshold, frangi
from skimage.morphology import remove_small_objects

from cffa_core.data.contracts import Bytes, Mask

REFERENCE_SIDE = 512  # sizes below are pixels of an image of this side and grow with it
SIGMAS = (1.5, 2.5, 3.5)
BACKGROUND_SIGMA = 16.0
RIM = 12.0  # the aperture's edge is a ridge itself
SURE, LIKELY = 0.08, 0.13  # shares of the field of view: the strongest ridges, and those that are kept if joined to one
SMALLEST = 80.0
SOFTNESS = 1.0


def frangi_vessels(cf: Bytes, valid: Mask) -> Mask:
    """Vessels of a photograph ``(H, W, 3)``, as ``(H, W)`` bool inside ``valid`` without its rim.

    Frangi's filter (Frangi et al. 1998) on the green channel, where vessels are dark ridges, after the uneven
    illumination is taken out; the strongest 8 % of the ridges and what of the strongest 13 % is joined to them.
    A field of view too small to have an inside gives an empty map.
    """
    unit = max(valid.shape) / REFERENCE_SIDE
    field = _inside(valid, max(1, round(RIM * unit)))
    if not field.any():
        return field
    seen = valid.astype(np.float32)
    green = np.asarray(cf[..., 1] / 255, dtype=np.float32)
    sigma = BACKGROUND_SIGMA * unit
    flat = np.where(valid, green - _local_mean(green, seen, sigma), 0).astype(np.float32)
    spread = np.sqrt(_local_mean(flat * flat, seen, 2 * sigma))
    # Below 0.7 pixels a Gaussian is no scale any more but the noise of single pixels.
    scales = [max(0.7, scale * unit) for scale in SIGMAS]
    ridges = frangi(flat / np.maximum(spread, 1e-3), sigmas=scales, black_ridges=True)
    ridges = np.where(field, ridges, 0)
    low, high = np.quantile(ridges[field], [1 - LIKELY, 1 - SURE])
    found = apply_hysteresis_threshold(ridges, low, high) & (ridges > 0)
    return np.asarray(remove_small_objects(found, max_size=int(SMALLEST * unit**2)), dtype=np.bool_)


def scribble(vessels: Mask) -> Bytes:
    """A vessel map ``(H, W)`` bool as a soft drawing ``(H, W)`` u8, white on black: one line style for all sources."""
    unit = max(vessels.shape) / REFERENCE_SIDE
    drawn = cv2.GaussianBlur(vessels.astype(np.float32), (0, 0), max(0.5, SOFTNESS * unit))
    return np.asarray((drawn * 255).round(), dtype=np.uint8)


def tile(image: Bytes, size: int) -> Bytes:
    """An image ``(H, W)`` or ``(H, W, 3)`` averaged to ``size`` x ``size`` and blown up again: coarse and blurred.

    It keeps disc, macula, colour and illumination, and loses lesions and all but the broadest vessels; a ``size`` at or
    above the image's own leaves it as it is.
    """
    height, width = image.shape[:2]
    if size >= max(height, width):
        return image.copy()
    small = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _local_mean(image: NDArray[np.float32], seen: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Gaussian mean of what was seen: what was not, has no say."""
    weight = np.maximum(cv2.GaussianBlur(seen, (0, 0), sigma), 1e-3)
    return np.asarray(cv2.GaussianBlur(image * seen, (0, 0), sigma) / weight, dtype=np.float32)


def _inside(valid: Mask, radius: int) -> Mask:
    """``valid`` without its rim and without the rim of the image."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    padded = np.pad(valid.astype(np.uint8), radius)
    return np.asarray(cv2.erode(padded, disc)[radius:-radius, radius:-radius] > 0)
