"""Laying an edit onto the pixels of a pair: where it may be, how much of it each pixel gets, and nothing anywhere else.

A user expects what was not edited to be THE SAME, and a VAE gives no pixel back as it was. So what is laid on is the
change that the edit made, and only around the cells on which it acted; where the change is strong, the edited picture
itself, or a lesion that was removed would leave behind what the VAE had not held of it. Knows arrays, no models.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from cffa_core.data.field_of_view import field_of_view

STRONG = 12.0  # grey levels: above what guidance leaves everywhere, below what a lesion is
WIDEN = 9  # pixels


def pixel_weight(touched: NDArray[np.bool_], stride: int) -> NDArray[np.float32]:
    """Weight ``(H, W)`` in [0, 1] of the edit at each pixel; ``touched (h, w)`` are the cells it acted on.

    1 on the cells and ``stride`` pixels (one cell) around them, where the decoder still shows them; then it falls to 0
    over two more cells, so that no border is seen. Beyond, pixels are the source's own.
    """
    cells = np.kron(touched.astype(np.uint8), np.ones((stride, stride), np.uint8))
    if not cells.any():
        return np.zeros(cells.shape, np.float32)
    away = cv2.distanceTransform(1 - cells, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    weight: NDArray[np.float32] = np.clip(1 - (away - stride) / (2 * stride), 0, 1).astype(np.float32)
    return weight


def seen_area(cf: NDArray[np.uint8], fa: NDArray[np.uint8], border: int) -> NDArray[np.bool_]:
    """What both cameras saw, without ``border`` pixels at the aperture: its rim draws guidance, and is no tissue."""
    seen = field_of_view(cf) & field_of_view(fa)
    if seen.all():
        return seen
    depth = cv2.distanceTransform(seen.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.asarray(depth > border)


def lay_on(
    source: NDArray[np.uint8], before: NDArray[np.uint8], after: NDArray[np.uint8], weight: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """``source + weight * (after - before + strong * (before - source))`` inside the camera's aperture.

    ``before`` and ``after`` are the decoded latents; ``weight (H, W)``. With ``strong`` = 1 and full weight
    that is ``after``.
    """
    change = after.astype(np.float32) - before
    share, strong = weight * field_of_view(source), strongly_changed(change)
    if source.ndim == 3:
        share, strong = share[..., None], strong[..., None]
    laid = source + share * (change + strong * (before.astype(np.float32) - source))
    return np.clip(np.round(laid), 0, 255).astype(np.uint8)


def strongly_changed(change: NDArray[np.float32]) -> NDArray[np.float32]:
    """0 where a decoded picture hardly changed, 1 where it did by :data:`STRONG` grey levels, soft between: ``(H, W)``.

    ``change`` is ``(H, W)`` or ``(H, W, 3)``. Widened by some pixels, since a decoder blurs what it draws.
    """
    largest = np.abs(change) if change.ndim == 2 else np.abs(change).max(axis=2)
    wide = cv2.dilate(largest, np.ones((WIDEN, WIDEN), np.uint8))
    share: NDArray[np.float32] = np.clip(cv2.GaussianBlur(wide, (0, 0), WIDEN / 4) / STRONG, 0, 1).astype(np.float32)
    return share


def inner_weight(where: NDArray[np.bool_], stride: int) -> NDArray[np.float32]:
    """1 inside the user's area, 0 outside, with a border of half a cell inside it over which it rises."""
    # Padded, so that the picture's own border is not taken for the area's.
    depth = cv2.distanceTransform(np.pad(where, stride, "edge").astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    weight: NDArray[np.float32] = np.clip(depth[stride:-stride, stride:-stride] / (stride / 2), 0, 1).astype(np.float32)
    return weight


def mean_difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Mean absolute difference in grey levels; 0 of no pixels."""
    if a.size == 0:
        return 0.0
    return round(float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(dtype=np.float64)), 4)


def grey(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The one channel of a decoded FA, as of a generated one."""
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), dtype=np.uint8)
