"""Heat maps: an attention map as colours over the picture that it belongs to.

Works on arrays alone; what a map means and how pictures stand on a sheet is not known here.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# Share of the colour at the coldest and at the hottest place; the picture stays visible under both.
_COLD, _HOT = 0.15, 0.72


def enlarged(heat: Floats, size: tuple[int, int]) -> Floats:
    """``(h, w)`` smoothly brought to ``size = (H, W)``; bicubic, and what it overshoots is cut off."""
    wide = cv2.resize(heat, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)
    return np.asarray(np.clip(wide, heat.min(), heat.max()), dtype=np.float32)


def scaled(heat: Floats, limits: tuple[float, float] | None = None) -> Floats:
    """``heat`` as 0 ... 1 between ``limits`` (None: its own least and greatest value); an even map is 0."""
    low, high = (float(heat.min()), float(heat.max())) if limits is None else limits
    if high <= low:
        return np.zeros_like(heat)
    return np.asarray(np.clip((heat - low) / (high - low), 0, 1), dtype=np.float32)


def colours(values: Floats) -> Bytes:
    """``(..., )`` in 0 ... 1 as RGB: dark violet for little, over red, to light yellow for much."""
    indexed = np.rint(values * 255).astype(np.uint8)
    flat = cv2.applyColorMap(indexed.reshape(-1, 1), cv2.COLORMAP_INFERNO)[:, 0, ::-1]
    return np.ascontiguousarray(flat.reshape(*values.shape, 3), dtype=np.uint8)


def overlay(picture: Bytes, heat: Floats, limits: tuple[float, float] | None = None) -> Bytes:
    """``heat (h, w)`` over ``picture (H, W, 3)`` or ``(H, W)`` uint8, as ``(H, W, 3)`` uint8.

    The picture is shown in grey, so that every colour is the map's.
    """
    grey = picture if picture.ndim == 2 else np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
    values = scaled(enlarged(heat, grey.shape[:2]), limits)
    share = (_COLD + (_HOT - _COLD) * values)[..., None]
    mixed = grey[..., None] * (1 - share) + colours(values) * share
    return np.asarray(np.rint(mixed), dtype=np.uint8)


def marked(picture: Bytes, point: tuple[float, float]) -> Bytes:
    """A copy of ``picture (H, W, 3)`` with a ring around ``point = (x, y)``, fractions of its width and height."""
    height, width = picture.shape[:2]
    centre = (min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1))
    radius = max(3, min(height, width) // 28)
    drawn = np.ascontiguousarray(picture)
    for colour, thickness in (((10, 12, 16), radius // 2 + 2), ((120, 235, 255), max(1, radius // 3))):
        drawn = cv2.circle(drawn.copy(), centre, radius, colour, thickness, cv2.LINE_AA)
    return np.asarray(drawn, dtype=np.uint8)
