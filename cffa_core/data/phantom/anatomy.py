"""Where things are in one eye: disc, cup, fovea, laterality, pigment. Vessels and lesions are laid out around them.

Coordinates are fractions of the image width, y downwards. Everything is laid out as a right eye (disc on the right,
because the nasal side of a right eye is on the image's right) and mirrored for a left one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .fields import Field, grid, soft_step, stream

Eye = Literal["OD", "OS"]

# Linear-looking RGB of the fundus background per pigment, 0..1: light orange, orange-red, red, brown, pinkish, tan.
PIGMENTS = (
    (0.86, 0.47, 0.17),
    (0.84, 0.39, 0.12),
    (0.74, 0.31, 0.14),
    (0.58, 0.34, 0.16),
    (0.77, 0.50, 0.43),
    (0.70, 0.45, 0.24),
)


@dataclass(frozen=True)
class Anatomy:
    """Layout of one eye. Lengths and points in fractions of the image width; angles in radians."""

    eye: Eye
    disc: tuple[float, float]
    disc_axes: tuple[float, float]
    disc_tilt: float
    cup: tuple[float, float]
    cup_ratio: float
    fovea: tuple[float, float]
    faz_radius: float
    macula_radius: float
    pigment: tuple[float, float, float]
    tessellation: float
    disc_paleness: float

    @property
    def disc_radius(self) -> float:
        """Mean radius of the disc."""
        return 0.5 * (self.disc_axes[0] + self.disc_axes[1])

    @property
    def span(self) -> float:
        """Distance from the disc's centre to the fovea, about 2.5 disc diameters."""
        return math.dist(self.disc, self.fovea)


def lay_out(seed: int) -> Anatomy:
    """Draw one eye's layout; the view is centred on the macula, on the disc, or between the two."""
    rng = stream(seed, "anatomy")
    eye: Eye = "OD" if rng.random() < 0.5 else "OS"
    zoom = rng.uniform(0.88, 1.12)
    span = 0.345 * zoom * rng.uniform(0.94, 1.06)
    centring = rng.choice([0.0, 0.25, 0.5, 0.9], p=[0.3, 0.3, 0.25, 0.15])
    droop = span * math.sin(rng.normal(0.11, 0.04))
    disc_x = 0.5 + span * (1.0 - centring) + rng.normal(0, 0.015)
    disc_y = 0.5 - 0.5 * droop + rng.normal(0, 0.02)
    fovea_x, fovea_y = disc_x - span, disc_y + droop
    radius = span / rng.uniform(4.7, 5.4)
    ratio = rng.uniform(1.04, 1.16)
    tilt = rng.normal(0, 0.15)
    base = np.array(PIGMENTS[rng.integers(len(PIGMENTS))])
    other = np.array(PIGMENTS[rng.integers(len(PIGMENTS))])
    mixed = base + rng.uniform(0, 0.5) * (other - base)
    cup_x = disc_x - 0.12 * radius
    if eye == "OS":
        disc_x, fovea_x, cup_x, tilt = 1 - disc_x, 1 - fovea_x, 1 - cup_x, -tilt
    return Anatomy(
        eye=eye,
        disc=(disc_x, disc_y),
        disc_axes=(radius / ratio**0.5, radius * ratio**0.5),
        disc_tilt=tilt,
        cup=(cup_x, disc_y + rng.normal(0, 0.05) * radius),
        cup_ratio=rng.uniform(0.3, 0.66),
        fovea=(fovea_x, fovea_y),
        faz_radius=span * rng.uniform(0.055, 0.085),
        macula_radius=span * rng.uniform(0.26, 0.36),
        pigment=(float(mixed[0]), float(mixed[1]), float(mixed[2])),
        tessellation=float(rng.beta(1.2, 2.5)),
        disc_paleness=float(rng.uniform(0.3, 1.0)),
    )


def ellipse(
    resolution: int, centre: tuple[float, float], axes: tuple[float, float], tilt: float, softness: float
) -> Field:
    """Soft filled ellipse, (H, W) in 0..1, 0.5 on the rim; ``softness`` is the rim's width in radii."""
    x, y = grid(resolution)
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    u = dx * math.cos(tilt) + dy * math.sin(tilt)
    v = -dx * math.sin(tilt) + dy * math.cos(tilt)
    distance = np.sqrt((u / axes[0]) ** 2 + (v / axes[1]) ** 2)
    return soft_step(np.asarray(1.0 - distance, np.float32), softness)


def disc_field(eye: Anatomy, resolution: int) -> Field:
    """The optic disc as a soft ellipse."""
    return ellipse(resolution, eye.disc, eye.disc_axes, eye.disc_tilt, 0.22)


def cup_field(eye: Anatomy, resolution: int) -> Field:
    """The cup inside the disc as a soft ellipse."""
    axes = (eye.disc_axes[0] * eye.cup_ratio, eye.disc_axes[1] * eye.cup_ratio)
    return ellipse(resolution, eye.cup, axes, eye.disc_tilt, 0.7)
