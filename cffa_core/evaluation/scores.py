"""Alignment scores of one CF against one FA on the same pixel grid (METHODS 8).

:func:`features` prepares one image, :func:`compare` scores two prepared images inside the eroded area that both saw; so
a set of N pairs and all its shuffled pairs cost 2N preparations. Which images belong together is not known here.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from skimage.morphology import skeletonize
from skimage.registration import phase_cross_correlation

from cffa_core.data.contracts import Bytes, Mask, PairImages
from cffa_core.data.ridges import Map, filled, interior, ridge_map, unit_of, vessels

MAX_SIDE = 1024  # larger images are scored at this side
MIN_COMMON = 0.02  # of the grid; below this a pair shares too little to be scored
NGF_SIGMA = 1.5
MI_BINS = 32
MI_SIGMA = 15.0  # wider than any vessel
MI_GAIN = 32.0  # levels per standard deviation: +-4 of them fill a byte
SHIFT_UPSAMPLING = 20
WINDOW_SIGMA = 6.0

HIGHER_IS_BETTER = ("ridge_correlation", "vessel_dice", "cl_dice", "ngf", "mutual_information")
SHIFT = "residual_shift_px"
SCORES = (*HIGHER_IS_BETTER, SHIFT)


@dataclass(frozen=True)
class Features:
    """What scoring needs of one image, kept small: a set keeps those of all its images.

    ``ridges`` (H, W) f16; ``normals`` (2, H, W) i8, the normalised gradient times 127; ``levels`` (H, W) u8, the
    high-passed grey values; ``field`` (H, W) the field of view without its rim. ``scale`` is native pixels per pixel of
    these arrays.
    """

    ridges: npt.NDArray[np.float16]
    normals: npt.NDArray[np.int8]
    levels: Bytes
    field: Mask
    scale: float


def features(grey: Bytes, valid: Mask, *, dark_vessels: bool) -> Features:
    """Prepare CF's green channel (``dark_vessels=True``) or an FA, (H, W) u8, with its valid mask."""
    scale = max(1.0, max(grey.shape) / MAX_SIDE)
    if scale > 1:
        size = (round(grey.shape[1] / scale), round(grey.shape[0] / scale))
        grey = np.asarray(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
        valid = np.asarray(cv2.resize(valid.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)
    image = filled(grey, valid)
    field = interior(valid)
    ridges = ridge_map(image, dark=dark_vessels)
    return Features(ridges.astype(np.float16), _normals(image, field), _levels(image, field), field, scale)


def pair_features(images: PairImages) -> tuple[Features, Features]:
    """Features of both images of a pair: CF's green channel, in which vessels are dark, and FA."""
    green = np.ascontiguousarray(images.cf[..., 1])
    return (
        features(green, images.valid_cf, dark_vessels=True),
        features(images.fa, images.valid_fa, dark_vessels=False),
    )


def _normals(image: Map, field: Mask) -> npt.NDArray[np.int8]:
    """Normalised gradient ``g / sqrt(|g|^2 + e^2)``, with ``e`` the mean gradient inside the field."""
    smooth = cv2.GaussianBlur(image, (0, 0), NGF_SIGMA * unit_of(image.shape))
    gradient = np.stack([cv2.Sobel(smooth, cv2.CV_32F, 0, 1), cv2.Sobel(smooth, cv2.CV_32F, 1, 0)])
    size = np.sqrt((gradient**2).sum(axis=0))
    edge = float(size[field].mean()) if field.any() else 1.0
    return np.asarray(np.round(127 * gradient / np.sqrt(size**2 + edge**2 + 1e-12)), dtype=np.int8)


def _levels(image: Map, field: Mask) -> Bytes:
    """High-passed grey values in units of their own spread, as bytes.

    Illumination is left out because it is smooth in both images whether they belong together or not: of 26 real pairs
    23 have more mutual information of plain grey values than shuffled ones, and all 26 of these.
    """
    detail = image - cv2.GaussianBlur(image, (0, 0), MI_SIGMA * unit_of(image.shape))
    spread = float(detail[field].std()) if field.any() else 0.0
    return np.asarray(np.clip(128 + MI_GAIN * detail / max(spread, 1e-6), 0, 255), dtype=np.uint8)


def compare(cf: Features, fa: Features) -> dict[str, float] | None:
    """All scores of a CF against an FA; None if they share less than 2 % of the grid.

    An FA of another size is first brought to CF's grid. ``residual_shift_px`` is in native pixels of the CF.
    """
    if fa.ridges.shape != cf.ridges.shape:
        fa = _on_grid(fa, cf.ridges.shape)
    common = cf.field & fa.field
    if common.mean() < MIN_COMMON:
        return None
    a, b = cf.ridges.astype(np.float32), fa.ridges.astype(np.float32)
    vessels_a, vessels_b = vessels(a, common), vessels(b, common)
    return {
        "ridge_correlation": correlation(a[common], b[common]),
        "vessel_dice": dice(vessels_a, vessels_b),
        "cl_dice": cl_dice(vessels_a, vessels_b),
        "ngf": ngf(cf.normals, fa.normals, common),
        "mutual_information": mutual_information(cf.levels[common], fa.levels[common]),
        SHIFT: float(np.hypot(*shift(a, b, common))) * cf.scale,
    }


def _on_grid(image: Features, shape: tuple[int, ...]) -> Features:
    size = (shape[1], shape[0])

    def nearest(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.asarray(cv2.resize(array, size, interpolation=cv2.INTER_NEAREST))

    ridges = cv2.resize(image.ridges.astype(np.float32), size, interpolation=cv2.INTER_LINEAR).astype(np.float16)
    normals = np.stack([nearest(plane.view(np.uint8)).view(np.int8) for plane in image.normals])
    return Features(ridges, normals, nearest(image.levels), nearest(image.field.astype(np.uint8)) > 0, image.scale)


def correlation(a: Map, b: Map) -> float:
    """Pearson correlation; 0 where one side has no variation."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size > 0 else 0.0


def dice(a: Mask, b: Mask) -> float:
    """Dice overlap of two masks; 0 if both are empty (no vessel is no agreement)."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 0.0


def cl_dice(a: Mask, b: Mask) -> float:
    """Centre-line Dice (Shit et al. 2021, eq. 1-3): each skeleton's share inside the other mask, harmonic mean."""
    line_a, line_b = skeletonize(a), skeletonize(b)
    if not line_a.any() or not line_b.any():
        return 0.0
    precision = float((line_a & b).sum() / line_a.sum())
    sensitivity = float((line_b & a).sum() / line_b.sum())
    return 2 * precision * sensitivity / (precision + sensitivity) if precision + sensitivity > 0 else 0.0


def ngf(a: npt.NDArray[np.int8], b: npt.NDArray[np.int8], field: Mask) -> float:
    """Mean of ``<n_a, n_b>^2`` over the field (Haber and Modersitzki 2006): parallel edges, whatever their sign."""
    inner = (a[:, field].astype(np.float32) * b[:, field].astype(np.float32)).sum(axis=0) / 127**2
    return float((inner**2).mean())


def mutual_information(a: Bytes, b: Bytes) -> float:
    """Mutual information in nats of two samples of bytes, over 32 equally wide bins each."""
    joint, _, _ = np.histogram2d(a, b, bins=MI_BINS, range=((0, 256), (0, 256)))
    joint /= joint.sum()
    expected = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log(joint[some] / expected[some])).sum())


def shift(a: Map, b: Map, field: Mask) -> tuple[float, float]:
    """Rows and columns by which ``b`` must be moved to lie on ``a``, by phase correlation of the ridge maps.

    On raw intensities phase correlation follows illumination and apertures; on ridges it follows vessels (METHODS 8).
    """
    window = cv2.GaussianBlur(field.astype(np.float32), (0, 0), WINDOW_SIGMA * unit_of(field.shape)) * field
    moving, fixed = (b - b[field].mean()) * window, (a - a[field].mean()) * window
    if not moving.any() or not fixed.any():
        return 0.0, 0.0
    found, _, _ = phase_cross_correlation(fixed, moving, upsample_factor=SHIFT_UPSAMPLING)
    return float(found[0]), float(found[1])
