"""Bring an FA onto the pixel grid of its CF by corresponding landmarks (METHODS 1, layouts b and c).

Knows points and pixels; which files hold them is told by ``layouts``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from cffa_core.data.contracts import Bytes, Mask

RANSAC_PX = 5.0
HOMOGRAPHY_POINTS = 4
AFFINE_POINTS = 3
MAX_SCALE = 20.0
MAX_POINTS = 10_000

Points = npt.NDArray[np.float64]


class BadLandmarks(ValueError):
    """Landmarks that give no registration; the message says why."""


@dataclass(frozen=True)
class Transform:
    """A map from FA pixels to CF pixels, (3, 3); ``residual_px`` is the RMS distance over its ``good`` points."""

    matrix: Points
    kind: Literal["homography", "affine"]
    residual_px: float
    good: int
    total: int


def parse_points(text: str) -> Points:
    """Landmarks of one image, (N, 2): x and y per line, blank or comma between; ``#`` starts a comment.

    Raises :class:`BadLandmarks` naming the line.
    """
    points: list[tuple[float, float]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.split("#", 1)[0].replace(",", " ").replace(";", " ").split()
        if not fields:
            continue
        try:
            x, y = (float(value) for value in fields)
        except ValueError as error:
            raise BadLandmarks(f"line {number}: expected two numbers, x and y") from error
        if not (math.isfinite(x) and math.isfinite(y)) or max(abs(x), abs(y)) > 1e6:
            raise BadLandmarks(f"line {number}: not a pixel position")
        points.append((x, y))
        if len(points) > MAX_POINTS:
            raise BadLandmarks(f"more than {MAX_POINTS} points")
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def fit(fa_points: Points, cf_points: Points, fa_size: tuple[int, int]) -> Transform:
    """Fit the map that takes ``fa_points`` to ``cf_points``, both (N, 2), for an FA of (width, height).

    A homography by RANSAC (5 px); an affine map if fewer than four points agree or the homography folds the image.
    Raises :class:`BadLandmarks` if neither is possible.
    """
    if len(fa_points) != len(cf_points):
        raise BadLandmarks(
            f"{len(cf_points)} CF points but {len(fa_points)} FA points; the same points in the same order"
        )
    if len(fa_points) < AFFINE_POINTS:
        raise BadLandmarks(f"{len(fa_points)} points; at least {AFFINE_POINTS} are needed")
    if len(fa_points) >= HOMOGRAPHY_POINTS:
        found, inliers = cv2.findHomography(fa_points, cf_points, cv2.RANSAC, RANSAC_PX)
        if found is not None and inliers.sum() >= HOMOGRAPHY_POINTS and is_plausible(found, fa_size):
            return _transform(found, "homography", fa_points, cf_points, inliers)
    found, inliers = cv2.estimateAffine2D(fa_points, cf_points, method=cv2.RANSAC, ransacReprojThreshold=RANSAC_PX)
    if found is not None and inliers.sum() >= AFFINE_POINTS:
        matrix = np.vstack([found, [0.0, 0.0, 1.0]])
        if is_plausible(matrix, fa_size):
            return _transform(matrix, "affine", fa_points, cf_points, inliers)
    raise BadLandmarks("the points agree on no homography and no affine map; are they in the same order in both files?")


def _transform(
    matrix: Points, kind: Literal["homography", "affine"], fa: Points, cf: Points, inliers: npt.NDArray[np.uint8]
) -> Transform:
    good = inliers.ravel().astype(bool)
    distance = np.linalg.norm(project(matrix, fa) - cf, axis=1)
    residual = float(np.sqrt(np.mean(distance[good] ** 2)))
    return Transform(matrix, kind, residual, int(good.sum()), len(good))


def project(matrix: Points, points: Points) -> Points:
    """Map (N, 2) points by a (3, 3) matrix."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ matrix.T
    return np.asarray(mapped[:, :2] / mapped[:, 2:])


def is_plausible(matrix: Points, size: tuple[int, int]) -> bool:
    """False for a map that folds the image, mirrors it, or scales a side by more than 20."""
    width, height = size
    corners = np.array([[0.0, 0.0], [width, 0.0], [width, height], [0.0, height]])
    depth = np.column_stack([corners, np.ones(4)]) @ matrix[2]
    if not np.isfinite(matrix).all() or (depth <= 1e-6 * np.abs(depth).max()).any():
        return False
    mapped = project(matrix, corners)
    sides = np.roll(mapped, -1, axis=0) - mapped
    following = np.roll(sides, -1, axis=0)
    turns = sides[:, 0] * following[:, 1] - sides[:, 1] * following[:, 0]
    lengths = np.linalg.norm(sides, axis=1) / np.array([width, height, width, height])
    return bool((turns > 0).all() and lengths.max() < MAX_SCALE and lengths.min() > 1 / MAX_SCALE)


def warp(fa: Bytes, valid: Mask, transform: Transform, size: tuple[int, int]) -> tuple[Bytes, Mask]:
    """Warp an FA (h, w) and its valid mask onto a CF grid of (width, height); what lies outside is black and invalid.

    The valid mask loses one pixel at its rim, where the interpolation mixes in the outside.
    """
    image = cv2.warpPerspective(fa, transform.matrix, size, flags=cv2.INTER_CUBIC)
    inside = cv2.erode(np.pad(valid.astype(np.uint8), 1), np.ones((3, 3), np.uint8))[1:-1, 1:-1]
    seen = cv2.warpPerspective(inside, transform.matrix, size, flags=cv2.INTER_NEAREST) > 0
    return np.where(seen, image, 0).astype(np.uint8), np.asarray(seen)
