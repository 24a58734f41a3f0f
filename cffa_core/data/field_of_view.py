"""Which pixels a camera saw: the area inside its aperture, whatever the aperture's shape.

Camera black is a flat, near-black region that touches the image border. Dark tissue is dark too (an FA may be almost
black from end to end), so the level that counts as black is one at which the region hardly grows when the level rises.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from cffa_core.data.contracts import Bytes, Mask

WORKING_SIDE = 768  # the mask of a large image is found at this size
LEVELS = (4, 6, 9, 12, 16, 20, 26)
STABLE_GROWTH = 0.015  # of the image area, when the level rises by half and two
SPECK = 0.01  # valid components below this fraction of the image area are labels and reflections
INTRUSION = 0.012  # black thinner than this fraction of the side is a shadow, a lash or a vessel at the border


def field_of_view(image: Bytes) -> Mask:
    """Valid mask (H, W) of a CF (H, W, 3) or FA (H, W), 8 bits.

    A whole image without camera black gives True everywhere; a wholly black one False.
    """
    height, width = image.shape[:2]
    brightest = image.max(axis=2) if image.ndim == 3 else image
    scale = min(1.0, WORKING_SIDE / max(height, width))
    if scale < 1.0:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        brightest = cv2.resize(brightest, size, interpolation=cv2.INTER_AREA)
    smooth = cv2.medianBlur(np.ascontiguousarray(brightest), 5)
    outside = _camera_black(smooth)
    valid = _without_specks(~outside)
    if scale < 1.0:
        full = cv2.resize(valid.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        return np.asarray(full > 0)
    return valid


def _camera_black(smooth: Bytes) -> Mask:
    """Near-black area that touches the border, at the lowest level at which it is stable."""
    lowest = _touching_border(smooth <= LEVELS[0])
    for level in LEVELS:
        region = _touching_border(smooth <= level)
        grown = _touching_border(smooth <= 1.5 * level + 2)
        if region.any() and grown.mean() - region.mean() < STABLE_GROWTH:
            return _without_intrusions(region)
    return _without_intrusions(lowest)


def _touching_border(dark: npt.NDArray[np.bool_]) -> Mask:
    """Components of ``dark`` that touch the image border."""
    _, labels = cv2.connectedComponents(dark.astype(np.uint8), connectivity=4)
    rim = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.asarray(np.isin(labels, np.setdiff1d(rim, 0)))


def _without_intrusions(outside: Mask) -> Mask:
    """Drop thin parts of the outside: real apertures are wide, shadows and dark vessels at the border are not."""
    radius = max(1, round(INTRUSION * max(outside.shape)))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    # The rim is continued beyond the image, so that the thin corners beside a round aperture stay.
    padded = np.pad(outside.astype(np.uint8), 2 * radius, mode="edge")
    opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, disc)[2 * radius : -2 * radius, 2 * radius : -2 * radius]
    return _touching_border(opened > 0)


def _without_specks(valid: Mask) -> Mask:
    """Keep the components that are large enough to be a field of view."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(valid.astype(np.uint8), connectivity=4)
    areas = stats[:, cv2.CC_STAT_AREA]
    keep = [label for label in range(1, count) if areas[label] >= SPECK * valid.size]
    return np.asarray(np.isin(labels, keep))
