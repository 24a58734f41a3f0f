"""Smooth random fields and coordinate grids: the raw material of every texture in a phantom.

All lengths are fractions of the image width, so that one seed describes the same eye at every resolution. Knows nothing
of eyes.
"""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from cffa_core.rng import derive_seed

Field = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


def stream(seed: int, part: str) -> np.random.Generator:
    """Generator of one named part of one phantom; parts do not disturb one another's draws."""
    return np.random.default_rng(derive_seed(seed, "phantom", part))


def grid(resolution: int) -> tuple[Field, Field]:
    """Pixel centres ``(x, y)``, each (H, W) float32 in 0..1."""
    axis = (np.arange(resolution, dtype=np.float32) + 0.5) / resolution
    x, y = np.meshgrid(axis, axis)
    return np.asarray(x, np.float32), np.asarray(y, np.float32)


def smooth_noise(rng: np.random.Generator, resolution: int, cells: int, aspect: float = 1.0) -> Field:
    """Gaussian noise with about ``cells`` cells across, bicubically interpolated; (H, W), near unit variance.

    ``aspect`` above 1 stretches the cells along x.
    """
    columns = max(2, round(cells / aspect)) + 3
    lattice = rng.standard_normal((cells + 3, columns)).astype(np.float32)
    field = cv2.resize(lattice, (resolution, resolution), interpolation=cv2.INTER_CUBIC)
    return np.asarray(field * 1.35, dtype=np.float32)


def octaves(rng: np.random.Generator, resolution: int, cells: int, count: int, gain: float = 0.55) -> Field:
    """Sum of ``count`` noises, each twice as fine and ``gain`` times as strong as the one before; unit variance."""
    total = np.zeros((resolution, resolution), np.float32)
    power = 0.0
    for octave in range(count):
        weight = gain**octave
        total += weight * smooth_noise(rng, resolution, cells * 2**octave)
        power += weight**2
    return np.asarray(total / np.float32(power**0.5), dtype=np.float32)


def filaments(rng: np.random.Generator, resolution: int, cells: int, sharpness: float) -> Field:
    """A net of thin winding lines, 0..1: the zero crossings of smooth noise; used for capillaries and choroid."""
    return np.asarray(np.exp(-sharpness * np.abs(smooth_noise(rng, resolution, cells))), dtype=np.float32)


def soft_step(field: Field, width: float) -> Field:
    """0..1 ramp of ``field`` through zero (positive inside), about ``width`` wide."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(field / (0.25 * width), -30, 30))), dtype=np.float32)


def blob(x: Field, y: Field, centre: tuple[float, float], sigma: float) -> Field:
    """Isotropic Gaussian of height 1."""
    return np.asarray(np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma**2)), dtype=np.float32)


def blur(field: Field, sigma: float) -> Field:
    """Gaussian blur with ``sigma`` in pixels; a sigma below 0.15 px changes nothing."""
    if sigma < 0.15:
        return field
    return np.asarray(cv2.GaussianBlur(field, (0, 0), sigma), dtype=np.float32)
