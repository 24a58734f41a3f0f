"""The default feature extractor: texture statistics of a fundus image from a fixed filter bank, no weights.

Statistics of a Laplacian pyramid in the manner of Portilla and Simoncelli (2000): how strong each scale is, how sparse
and how skewed, how line-like, how scales and colours go together, and where in the image. It is not learned on any
base, so sets drawn from different bases can be compared, and a base's own decoder gets no advantage from it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np

from cffa_core.data import ridges
from cffa_core.data.contracts import Bytes, Mask, PairImages
from cffa_core.data.ridges import Map, interior
from cffa_core.evaluation.bootstrap import Values

SIDE = 512  # images are brought to this longer side, so that scales mean the same in every set
LEVELS = 6
ORIENTED = 4  # levels whose orientation is measured
GRID = 3
FLOOR = 0.002  # grey levels of 1; weaker detail than half a level of 255 counts as none
TENSOR_SIDE = 7  # pixels of the window in which a direction is looked for
FILL_STRIDE, FILL_SIGMA = 8, 1.0
# Centre and spread of each kind of statistic over real and procedural images: all kinds weigh about the same.
KINDS = {
    "mean": (0.25, 0.1),
    "area": (0.75, 0.15),
    "energy": (-3.9, 0.35),
    "sparsity": (0.68, 0.06),
    "skew": (0.2, 0.15),
    "coherence": (0.68, 0.08),
    "across": (0.6, 0.08),
    "colour": (0.4, 0.25),
    "light": (0.0, 0.05),
    "detail": (-0.15, 0.33),
}


class FilterBank:
    """Extractor ``filters``: 65 numbers of a CF, 47 of an FA, each about 0 in the middle with a spread of about 1."""

    name = "filters"

    @property
    def sha256(self) -> str:
        """Digest of the definition: of the source of this module and of the one that finds the field of view."""
        found = hashlib.sha256()
        for source in (__file__, ridges.__file__):
            found.update(Path(source).read_bytes())
        return found.hexdigest()

    def pair(self, images: PairImages) -> tuple[Values, Values]:
        """Features of CF (65,) and FA (47,), each inside its own field of view without the rim."""
        return cf_features(images.cf, images.valid_cf), fa_features(images.fa, images.valid_fa)


def fa_features(fa: Bytes, valid: Mask) -> Values:
    """Features (47,) of one angiogram (H, W) u8."""
    grey, valid = _at_side(fa, valid)
    field = _field(valid)
    return np.array(_of_light(_unit(grey, valid), field), dtype=np.float64)


def cf_features(cf: Bytes, valid: Mask) -> Values:
    """Features (65,) of one colour photograph (H, W, 3) u8 RGB: those of its lightness and of two opponent colours."""
    rgb, valid = _at_side(cf, valid)
    field = _field(valid)
    red, green, blue = np.ascontiguousarray(_unit(rgb, valid).transpose(2, 0, 1))
    light: Map = (red + green + blue) / np.float32(3)
    values = _of_light(light, field)
    light_bands, _ = _pyramid(light)
    fields = _fields(field)
    for opponent in (red - green, (red + green) / np.float32(2) - blue):
        bands, _ = _pyramid(opponent)
        values.append(_scaled("mean", float(opponent[field].mean())))
        values += [_scaled("energy", _energy(band[where])) for band, where in zip(bands, fields, strict=True)]
        pairs = list(zip(light_bands, bands, fields, strict=True))[1:3]
        values += [_scaled("colour", _correlation(a[where], b[where])) for a, b, where in pairs]
    return np.array(values, dtype=np.float64)


def _of_light(image: Map, field: Mask) -> list[float]:
    """The 47 statistics of one grey image in [0, 1]."""
    bands, smooth = _pyramid(image)
    fields = _fields(field)
    inside = [band[where] for band, where in zip(bands, fields, strict=True)]
    values = [_scaled("mean", float(image[field].mean())), _scaled("area", float(field.mean()))]
    values += [_scaled("energy", _energy(band)) for band in inside]
    values += [_scaled("sparsity", _sparsity(band)) for band in inside]
    values += [_scaled("skew", _skew(band)) for band in inside]
    oriented = zip(smooth[:ORIENTED], fields[:ORIENTED], strict=True)
    values += [_scaled("coherence", _coherence(level, where)) for level, where in oriented]
    for fine, coarse, where in zip(bands[:-1], bands[1:], fields[:-1], strict=True):
        above = cv2.pyrUp(np.abs(coarse), dstsize=(fine.shape[1], fine.shape[0]))
        values.append(_scaled("across", _correlation(np.abs(fine)[where], above[where])))
    overall = float(image[field].mean())
    fine_energy = _energy(inside[2])
    for cell in _cells(field.shape):
        here = field[cell]
        values.append(_scaled("light", float(image[cell][here].mean()) - overall if here.any() else 0.0))
    for cell in _cells(fields[2].shape):
        here = fields[2][cell]
        values.append(_scaled("detail", _energy(bands[2][cell][here]) - fine_energy if here.any() else 0.0))
    return values


def _at_side(image: Bytes, valid: Mask) -> tuple[Bytes, Mask]:
    scale = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    kind = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    # A pixel counts as seen if all that it was made of was.
    seen = cv2.resize(valid.astype(np.float32), size, interpolation=kind) > 0.999
    return np.asarray(cv2.resize(image, size, interpolation=kind)), np.asarray(seen)


def _unit(image: Bytes, valid: Mask) -> Map:
    """Values (H, W) or (H, W, C) in [0, 1]; what was not seen is filled with the mean of what was seen nearby."""
    whole = np.asarray(image, dtype=np.float32) / np.float32(255)
    if valid.all():
        return np.asarray(whole, dtype=np.float32)
    size = (max(1, whole.shape[1] // FILL_STRIDE), max(1, whole.shape[0] // FILL_STRIDE))
    seen = valid.astype(np.float32)
    known = whole * (seen if whole.ndim == 2 else seen[..., None])
    coarse, weight = (cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in (known, seen))
    coarse, weight = (cv2.GaussianBlur(part, (0, 0), FILL_SIGMA) for part in (coarse, weight))
    weight = np.maximum(weight, 1e-3)
    mean = cv2.resize(coarse / (weight if whole.ndim == 2 else weight[..., None]), (whole.shape[1], whole.shape[0]))
    return np.where(valid if whole.ndim == 2 else valid[..., None], whole, mean).astype(np.float32)


def _field(valid: Mask) -> Mask:
    """The field of view without its rim; of an image in which nothing was seen, all of it."""
    field = interior(valid)
    return field if field.any() else np.ones_like(field)


def _fields(field: Mask) -> list[Mask]:
    """The field at each level of the pyramid."""
    found = []
    height, width = field.shape
    for _ in range(LEVELS):
        here = cv2.resize(field.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) > 0
        found.append(np.asarray(here) if here.any() else np.ones(here.shape, bool))
        height, width = (height + 1) // 2, (width + 1) // 2
    return found


def _pyramid(image: Map) -> tuple[list[Map], list[Map]]:
    """Band-passed and smoothed levels (Burt and Adelson 1983), finest first."""
    bands, smooth, level = [], [], np.asarray(image, dtype=np.float32)
    for _ in range(LEVELS):
        below = cv2.pyrDown(level)
        bands.append(np.asarray(level - cv2.pyrUp(below, dstsize=(level.shape[1], level.shape[0]))))
        smooth.append(level)
        level = np.asarray(below, dtype=np.float32)
    return bands, smooth


def _cells(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    rows, columns = (np.linspace(0, side, GRID + 1).round().astype(int) for side in shape[:2])
    return [(slice(rows[i], rows[i + 1]), slice(columns[j], columns[j + 1])) for i in range(GRID) for j in range(GRID)]


def _root(band: Map) -> float:
    """Root mean square."""
    return float(np.sqrt(np.square(band).mean(dtype=np.float64)))


def _energy(band: Map) -> float:
    return float(np.log(_root(band) + FLOOR))


def _sparsity(band: Map) -> float:
    """Mean size over root mean square: 0.80 for noise, less where few things stand out."""
    root = _root(band)
    return float(np.abs(band).mean(dtype=np.float64)) / root if root > FLOOR / 2 else 0.8


def _skew(band: Map) -> float:
    """Energy of the bright minus that of the dark, in [-1, 1]: vessels are dark in CF and bright in FA."""
    root = _root(band)
    return float((band * np.abs(band)).mean(dtype=np.float64)) / root**2 if root > FLOOR / 2 else 0.0


def _coherence(level: Map, field: Mask) -> float:
    """Share of the gradient energy that has one direction (structure tensor): 1 for lines, near 0 for noise."""
    x, y = cv2.Sobel(level, cv2.CV_32F, 1, 0), cv2.Sobel(level, cv2.CV_32F, 0, 1)
    xx, yy, xy = (cv2.blur(part, (TENSOR_SIDE, TENSOR_SIDE))[field] for part in (x * x, y * y, x * y))
    total = float((xx + yy).sum())
    return float(np.hypot(xx - yy, 2 * xy).sum()) / total if total > 0 else 0.0


def _correlation(a: Map, b: Map) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = _root(a) * _root(b)
    return float((a * b).mean(dtype=np.float64)) / size if size > (FLOOR / 8) ** 2 else 0.0


def _scaled(kind: str, value: float) -> float:
    centre, spread = KINDS[kind]
    return (value - centre) / spread
