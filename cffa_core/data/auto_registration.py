"""Bring an FA onto the pixel grid of its CF without landmarks, by the vessels that both show.

Three steps on ridge maps, on which the reversed contrast of the two does not matter: a search over rotations, scales
and all shifts by FFT; a refinement by SimpleITK (similarity, then affine) on maps from coarse to fine; and a test
whether the vessels lie on each other now, better than unrelated eyes ever do. What fails the test is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import SimpleITK
from scipy import fft

from cffa_core.data import dataset_folder
from cffa_core.data.contracts import Bytes, CheckedPair, Mask, PairImages
from cffa_core.data.registration import Transform, is_plausible, warp
from cffa_core.data.ridges import Map, filled, interior, ridge_map
from cffa_core.errors import Problem

sitk: Any = SimpleITK  # its functions say nothing of types
SIDE = 512  # both images are registered at this size
SEARCH_SIDE = 128
ROTATIONS = tuple(float(angle) for angle in range(-30, 31, 3))  # degrees
SCALES = tuple(float(scale) for scale in np.geomspace(0.7, 1.43, 13))
STARTS = 4
LOCAL = 20.0  # pixels of SIDE within which ridges are compared with their surroundings
ALIGNED = 0.30  # ridge correlation of a pair that is registered already
CONVINCING = 0.38  # strength: true real pairs have 0.44 and more, pairs of two eyes 0.20 at most (drawn ones 0.33)
MIN_OVERLAP = 0.2  # of the smaller field of view
COARSE, MIDDLE, FINE = (6.0, 4), (4.0, 2), (2.0, 2)  # blur in pixels of SIDE, and how much smaller the map is then
REFUSED = "not_registered"


@dataclass(frozen=True)
class Outcome:
    """What came of a registration: ``matrix`` (3, 3) maps FA pixels to CF pixels, None if it was refused.

    ``correlation`` of the ridge maps over the common field, in [-1, 1]; ``overlap`` is that field as a share of the
    smaller of the two.
    """

    matrix: npt.NDArray[np.float64] | None
    correlation: float
    overlap: float

    @property
    def strength(self) -> float:
        """Correlation times the root of the overlap: in a small common area unrelated vessels agree by chance."""
        return self.correlation * float(np.sqrt(min(1.0, self.overlap)))

    @property
    def reason(self) -> str:
        """Why it was refused, for people."""
        return (
            f"no convincing overlap of the vessels was found (ridge correlation {self.correlation:.2f}, common area "
            f"{self.overlap:.0%}); register the pair by landmarks, or leave it out"
        )


@dataclass(frozen=True)
class _Seen:
    """One image as ridges at working size: ``ridges`` (h, w) f32, 0 outside ``field`` (h, w); ``scale`` native px per
    working px."""

    ridges: Map
    field: Mask
    scale: float


def register(cf: Bytes, fa: Bytes, valid_cf: Mask, valid_fa: Mask) -> Outcome:
    """Register FA (h, w) onto CF (H, W, 3); valid masks as their images. Takes about two seconds of one core.

    Finds rotations up to 30 degrees, scales from 0.67 to 1.5 between images brought to one size, and any shift.
    """
    fixed = _seen(np.ascontiguousarray(cf[..., 1]), valid_cf, dark=True)
    moving = _seen(fa, valid_fa, dark=False)
    best = Outcome(None, 0.0, 0.0)
    if not fixed.field.any() or not moving.field.any():
        return best
    starts = _search(fixed, moving)
    if cf.shape[:2] == fa.shape:
        starts.append(np.eye(3))
    for start in starts:
        best = _better(best, _tried(fixed, moving, _similar(fixed, moving, start)))
    if best.matrix is not None:
        best = _better(best, _tried(fixed, moving, _affine(fixed, moving, best.matrix)))
    if best.matrix is None or best.strength < CONVINCING:
        return Outcome(None, best.correlation, best.overlap)
    native = np.diag([fixed.scale, fixed.scale, 1.0]) @ best.matrix @ np.diag([1 / moving.scale, 1 / moving.scale, 1.0])
    if not is_plausible(native, (fa.shape[1], fa.shape[0])):
        return Outcome(None, best.correlation, best.overlap)
    return Outcome(native, best.correlation, best.overlap)


def is_aligned(cf: Bytes, fa: Bytes, valid_cf: Mask, valid_fa: Mask) -> bool:
    """Whether the vessels of a CF and an FA of one size lie on each other as they are."""
    fixed = _seen(np.ascontiguousarray(cf[..., 1]), valid_cf, dark=True)
    moving = _seen(fa, valid_fa, dark=False)
    correlation, overlap = _agreement(fixed, moving, np.eye(3))
    return overlap >= MIN_OVERLAP and correlation >= ALIGNED


def applied(outcome: Outcome, images: PairImages) -> PairImages:
    """The pair with its FA on CF's grid; raises ``ValueError`` for a refused outcome."""
    if outcome.matrix is None:
        raise ValueError("a refused registration cannot be applied")
    transform = Transform(outcome.matrix, "affine", 0.0, 0, 0)
    size = (images.cf.shape[1], images.cf.shape[0])
    fa, seen = warp(images.fa, images.valid_fa, transform, size)
    return PairImages(images.cf, fa, images.valid_cf, seen, images.masks)


def register_again(
    source: Path, pairs: Sequence[CheckedPair], target: Path
) -> tuple[dict[str, dict[str, Any]], list[Problem]]:
    """Register pairs of a checked folder anew; new files of those that succeed go below ``target``.

    Returns what changes in the index entry of each of these, by name, and a problem for each that was refused.
    """
    changed: dict[str, dict[str, Any]] = {}
    refused: list[Problem] = []
    for pair, images in dataset_folder.read_pairs(source, pairs):
        outcome = register(images.cf, images.fa, images.valid_cf, images.valid_fa)
        if outcome.matrix is None:
            refused.append(Problem(pair.name, REFUSED, outcome.reason))
            continue
        made = applied(outcome, images)
        dataset_folder.write_fa(target, pair.name, made)
        changed[pair.name] = {"registration": "auto", "residual_px": None}
    return changed, refused


def _seen(grey: Bytes, valid: Mask, *, dark: bool) -> _Seen:
    scale = max(grey.shape) / SIDE
    size = (max(1, round(grey.shape[1] / scale)), max(1, round(grey.shape[0] / scale)))
    grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR))
    valid = np.asarray(cv2.resize(valid.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)
    field = interior(valid)
    ridges = ridge_map(filled(grey, valid), dark=dark)
    # A bright exudate must not outshine the vessels: the strongest percent counts alike.
    top = float(np.quantile(ridges[field], 0.99)) if field.any() else 1.0
    ridges = _among_neighbours(np.minimum(ridges, max(top, 1e-6)), field)
    return _Seen(ridges, field, scale)


def _among_neighbours(ridges: Map, field: Mask) -> Map:
    """Ridges less their local mean, in units of their local spread; 0 outside ``field``.

    Noise makes weak ridges, more of them where the image is bright: that alone would make any two eyes alike.
    """
    seen = field.astype(np.float32)
    weight = np.maximum(cv2.GaussianBlur(seen, (0, 0), LOCAL), 1e-3)
    mean = cv2.GaussianBlur(ridges * seen, (0, 0), LOCAL) / weight
    detail = (ridges - mean) * seen
    spread = np.sqrt(cv2.GaussianBlur(detail**2, (0, 0), 2 * LOCAL) / weight)
    floor = 0.1 * float(spread.max()) + 1e-6
    return np.asarray(detail / np.maximum(spread, floor), dtype=np.float32)


def _search(fixed: _Seen, moving: _Seen) -> list[npt.NDArray[np.float64]]:
    """The best starts by normalised cross-correlation of small maps, over rotations, scales and all shifts."""
    shrink = SEARCH_SIDE / SIDE
    pad = 2 * SEARCH_SIDE
    a, weight_a = _small(fixed, np.diag([shrink, shrink, 1.0]), pad)
    spectra = tuple(np.conj(fft.rfft2(plane)) for plane in (a, a * a, weight_a))
    centre = np.array([moving.ridges.shape[1] / 2, moving.ridges.shape[0] / 2])
    found: list[tuple[float, npt.NDArray[np.float64]]] = []
    for scale in SCALES:
        for angle in ROTATIONS:
            turn = np.vstack([cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), angle, scale), [0, 0, 1]])
            b, weight_b = _small(moving, np.diag([shrink, shrink, 1.0]) @ turn, pad)
            score, (dx, dy) = _best_shift(spectra, b, weight_b)
            move = np.array([[1.0, 0.0, dx / shrink], [0.0, 1.0, dy / shrink], [0.0, 0.0, 1.0]])
            found.append((score, move @ turn))
    found.sort(key=lambda item: -item[0])
    return [matrix for _, matrix in found[:STARTS]]


def _small(image: _Seen, matrix: npt.NDArray[np.float64], pad: int) -> tuple[Map, Map]:
    """Blurred ridges under ``matrix`` in a padded square, and where they were seen."""
    smooth = cv2.GaussianBlur(image.ridges, (0, 0), SIDE / SEARCH_SIDE / 2)
    middle = np.array([[1.0, 0.0, pad / 4], [0.0, 1.0, pad / 4], [0.0, 0.0, 1.0]])
    whole = (middle @ matrix)[:2]
    ridges = cv2.warpAffine(smooth, whole, (pad, pad), flags=cv2.INTER_AREA)
    seen = cv2.warpAffine(image.field.astype(np.float32), whole, (pad, pad), flags=cv2.INTER_LINEAR)
    return np.asarray(ridges, np.float32), np.asarray(seen, np.float32)


def _best_shift(fixed: tuple[npt.NDArray[np.complex64], ...], b: Map, weight: Map) -> tuple[float, tuple[float, float]]:
    """Highest masked normalised cross-correlation over all shifts (Padfield 2012), and the shift (x, y) of ``b``."""
    a_, a2_, wa_ = fixed

    def over(moving: npt.NDArray[np.complex64], spectrum: npt.NDArray[np.complex64]) -> npt.NDArray[np.float32]:
        return np.asarray(fft.irfft2(moving * spectrum, s=b.shape), np.float32)

    fb, fb2, fw = fft.rfft2(b), fft.rfft2(b * b), fft.rfft2(weight)
    count = np.maximum(over(fw, wa_), 1e-3)
    sum_a, sum_b = over(fw, a_), over(fb, wa_)
    covariance = over(fb, a_) - sum_a * sum_b / count
    spread_a = np.maximum(over(fw, a2_) - sum_a**2 / count, 0)
    spread_b = np.maximum(over(fb2, wa_) - sum_b**2 / count, 0)
    smallest = MIN_OVERLAP * min(float(weight.sum()), float(np.max(count)))
    floor = 1e-3 * float(np.max(spread_a * spread_b)) + 1e-9
    score = np.where(count > smallest, covariance / np.sqrt(np.maximum(spread_a * spread_b, floor)), -1)
    # A small common area correlates by chance.
    score *= np.minimum(1, np.sqrt(count / float(np.max(count))) * 1.2)
    row, column = np.unravel_index(int(score.argmax()), score.shape)
    height, width = b.shape
    dy = -(row if row <= height / 2 else row - height)
    dx = -(column if column <= width / 2 else column - width)
    return float(score[row, column]), (float(dx), float(dy))


def _similar(fixed: _Seen, moving: _Seen, start: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``start`` (FA to CF, (3, 3)) moved uphill as a similarity, on coarse maps."""
    inverse = np.asarray(np.linalg.inv(start), np.float64)  # SimpleITK maps points of the fixed image to the moving one
    centre = _centre(fixed)
    transform = sitk.Similarity2DTransform()
    transform.SetCenter(centre)
    transform.SetScale(float(np.sqrt(abs(np.linalg.det(inverse[:2, :2])))))
    transform.SetAngle(float(np.arctan2(inverse[1, 0], inverse[0, 0])))
    transform.SetTranslation(_offset(inverse, centre))
    _optimise(fixed, moving, transform, (COARSE,))
    return _matrix(transform, centre)


def _affine(fixed: _Seen, moving: _Seen, start: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """``start`` moved uphill as an affine map, on finer maps."""
    inverse = np.asarray(np.linalg.inv(start), np.float64)
    centre = _centre(fixed)
    transform = sitk.AffineTransform(2)
    transform.SetCenter(centre)
    transform.SetMatrix(tuple(float(value) for value in inverse[:2, :2].ravel()))
    transform.SetTranslation(_offset(inverse, centre))
    _optimise(fixed, moving, transform, (COARSE, MIDDLE, FINE))
    return _matrix(transform, centre)


def _centre(fixed: _Seen) -> tuple[float, float]:
    return (fixed.ridges.shape[1] / 2, fixed.ridges.shape[0] / 2)


def _offset(inverse: npt.NDArray[np.float64], centre: tuple[float, float]) -> tuple[float, ...]:
    """The translation of a map that is told about its centre."""
    middle = np.array(centre)
    return tuple(float(value) for value in inverse[:2, :2] @ middle + inverse[:2, 2] - middle)


def _matrix(transform: Any, centre: tuple[float, float]) -> npt.NDArray[np.float64]:
    """FA to CF, (3, 3), of a transform that maps CF to FA."""
    middle = np.array(centre)
    inverse = np.eye(3)
    inverse[:2, :2] = np.array(transform.GetMatrix()).reshape(2, 2)
    inverse[:2, 2] = np.array(transform.GetTranslation()) + middle - inverse[:2, :2] @ middle
    return np.asarray(np.linalg.inv(inverse))


def _optimise(fixed: _Seen, moving: _Seen, transform: Any, levels: Sequence[tuple[float, int]]) -> None:
    """Move ``transform`` uphill on the correlation of the blurred maps; on failure it stays where it was."""
    for sigma, shrink in levels:
        method = sitk.ImageRegistrationMethod()
        method.SetNumberOfThreads(1)  # the same result on every machine
        method.SetMetricAsCorrelation()
        method.SetMetricFixedMask(sitk.GetImageFromArray(fixed.field.astype(np.uint8)))
        method.SetMetricMovingMask(sitk.GetImageFromArray(moving.field.astype(np.uint8)))
        method.SetInterpolator(sitk.sitkLinear)
        method.SetShrinkFactorsPerLevel([shrink])
        method.SetSmoothingSigmasPerLevel([0.0])
        method.SetOptimizerAsRegularStepGradientDescent(
            learningRate=max(1.0, sigma), minStep=0.02, numberOfIterations=100, relaxationFactor=0.6
        )
        method.SetOptimizerScalesFromPhysicalShift()
        method.SetInitialTransform(transform, inPlace=True)
        blurred = (sitk.GetImageFromArray(cv2.GaussianBlur(one.ridges, (0, 0), sigma)) for one in (fixed, moving))
        before = transform.GetParameters()
        try:
            method.Execute(*blurred)
        except RuntimeError:  # the images left one another
            transform.SetParameters(before)


def _tried(fixed: _Seen, moving: _Seen, matrix: npt.NDArray[np.float64]) -> Outcome:
    return Outcome(matrix, *_agreement(fixed, moving, matrix))


def _better(one: Outcome, other: Outcome) -> Outcome:
    """The one whose vessels agree more, of those that have enough in common."""
    return other if other.overlap >= MIN_OVERLAP and other.strength > one.strength else one


def _agreement(fixed: _Seen, moving: _Seen, matrix: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Ridge correlation over the common field, and that field as a share of the smaller one."""
    size = (fixed.ridges.shape[1], fixed.ridges.shape[0])
    ridges = cv2.warpPerspective(moving.ridges, matrix, size, flags=cv2.INTER_LINEAR)
    seen = cv2.warpPerspective(moving.field.astype(np.uint8), matrix, size, flags=cv2.INTER_NEAREST) > 0
    common = fixed.field & seen
    area = abs(float(np.linalg.det(matrix[:2, :2])))
    smaller = min(float(fixed.field.sum()), area * float(moving.field.sum()))
    overlap = float(common.sum()) / max(smaller, 1.0)
    if common.sum() < 100:
        return 0.0, overlap
    # Sharper maps than the search's, blurred a little: single pixels of noise are no vessels.
    a, b = (cv2.GaussianBlur(one, (0, 0), 1.5)[common] for one in (fixed.ridges, ridges))
    a, b = a - a.mean(), b - b.mean()
    spread = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return (float((a * b).sum()) / spread if spread > 0 else 0.0), overlap
