"""Lesions of one eye as soft fields: haemorrhages, hard exudates, microaneurysms, leakage.

Places and shapes only; how a lesion looks in each modality is the renderer's business. Each finding draws from its own
stream, so that adding one leaves the others and the anatomy unchanged.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from .anatomy import Anatomy
from .fields import Field, blob, blur, grid, octaves, soft_step, stream

FINDINGS = ("haemorrhage", "exudate", "microaneurysm", "leakage")


def _place(rng: np.random.Generator, eye: Anatomy, near: float, far: float) -> tuple[float, float]:
    """A point between ``near`` and ``far`` spans from the fovea, off the disc and inside the frame."""
    for _ in range(40):
        radius, angle = eye.span * rng.uniform(near, far), rng.uniform(0, 2 * math.pi)
        point = (eye.fovea[0] + radius * math.cos(angle), eye.fovea[1] + radius * math.sin(angle))
        clear = math.dist(point, eye.disc) > 1.5 * eye.disc_radius
        if clear and math.hypot(point[0] - 0.5, point[1] - 0.5) < 0.4:
            return point
    return (eye.fovea[0], min(0.85, eye.fovea[1] + 0.5 * eye.span))


def _irregular(
    rng: np.random.Generator,
    resolution: int,
    centre: tuple[float, float],
    axes: tuple[float, float],
    tilt: float,
    rough: float,
    ragged: Field,
) -> Field:
    """Ellipse with a ragged outline, soft edge; (H, W) in 0..1."""
    x, y = grid(resolution)
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    u = dx * math.cos(tilt) + dy * math.sin(tilt)
    v = -dx * math.sin(tilt) + dy * math.cos(tilt)
    distance = np.sqrt((u / axes[0]) ** 2 + (v / axes[1]) ** 2)
    edge = np.asarray(1.0 - distance + rough * ragged, np.float32)
    return soft_step(edge, max(0.25, 0.004 / min(axes)))


def haemorrhages(seed: int, eye: Anatomy, resolution: int) -> Field:
    """Blots anywhere and flames along the nerve fibres, sometimes one large pre-retinal bleed; (H, W) in 0..1."""
    rng = stream(seed, "haemorrhage")
    ragged = octaves(rng, resolution, 24, 3)
    field = np.zeros((resolution, resolution), np.float32)
    for _ in range(int(rng.integers(3, 9))):
        centre = _place(rng, eye, 0.25, 1.5)
        if rng.random() < 0.55:
            size = eye.disc_radius * rng.uniform(0.10, 0.38)
            axes, tilt = (size, size * rng.uniform(0.7, 1.0)), rng.uniform(0, math.pi)
        else:
            # Fibres leave the disc radially: a flame points at it.
            tilt = math.atan2(centre[1] - eye.disc[1], centre[0] - eye.disc[0]) + rng.normal(0, 0.15)
            length = eye.disc_radius * rng.uniform(0.35, 0.8)
            axes = (length, length * rng.uniform(0.2, 0.35))
        field = np.maximum(field, _irregular(rng, resolution, centre, axes, tilt, 0.28, ragged))
    if rng.random() < 0.25:
        centre = _place(rng, eye, 0.5, 1.0)
        size = eye.disc_radius * rng.uniform(0.9, 1.6)
        field = np.maximum(field, _irregular(rng, resolution, centre, (size, 0.75 * size), 0.2, 0.3, ragged))
    return field


def exudates(seed: int, eye: Anatomy, resolution: int) -> Field:
    """Clusters or rings of small sharp deposits around the macula; (H, W) in 0..1."""
    rng = stream(seed, "exudate")
    size = resolution * 2
    canvas = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, 4))):
        centre = _place(rng, eye, 0.2, 0.8)
        ring = rng.random() < 0.5
        spread = eye.disc_radius * rng.uniform(0.4, 1.1)
        for _ in range(int(rng.integers(10, 38))):
            angle = rng.uniform(0, 2 * math.pi)
            distance = spread * (rng.normal(1.0, 0.12) if ring else abs(rng.normal(0, 0.6)))
            at = (centre[0] + distance * math.cos(angle), centre[1] + distance * math.sin(angle))
            radius = eye.disc_radius * rng.gamma(2.0, 0.032) + 0.0012
            axes = (round(radius * size * 16), round(radius * size * 16 * rng.uniform(0.6, 1.0)))
            point = (round(at[0] * size * 16), round(at[1] * size * 16))
            cv2.ellipse(canvas, point, axes, rng.uniform(0, 180), 0, 360, 255, -1, cv2.LINE_AA, 4)
    small = cv2.resize(canvas, (resolution, resolution), interpolation=cv2.INTER_AREA)
    return blur(np.asarray(small, np.float32) / np.float32(255), 0.0011 * resolution)


def microaneurysm_points(seed: int, eye: Anatomy) -> list[tuple[float, float, float]]:
    """(x, y, radius) of each microaneurysm, fractions of the image width."""
    rng = stream(seed, "microaneurysm")
    return [
        (*_place(rng, eye, 0.15, 1.15), float(rng.uniform(0.0022, 0.0042))) for _ in range(int(rng.integers(12, 45)))
    ]


def microaneurysms(seed: int, eye: Anatomy, resolution: int) -> Field:
    """Round dots of 2-4 px (at 512), scattered over the posterior pole; (H, W) in 0..1."""
    size = resolution * 2
    canvas = np.zeros((size, size), np.uint8)
    for x, y, radius in microaneurysm_points(seed, eye):
        point = (round(x * size * 16), round(y * size * 16))
        cv2.circle(canvas, point, round(radius * size * 16), 255, -1, cv2.LINE_AA, 4)
    small = cv2.resize(canvas, (resolution, resolution), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / np.float32(255)


def leakage(seed: int, eye: Anatomy, resolution: int, around: list[tuple[float, float, float]]) -> Field:
    """Fuzzy pools of dye, some of them around ``around`` (x, y, radius); (H, W) in 0..1."""
    rng = stream(seed, "leakage")
    x, y = grid(resolution)
    field = np.zeros((resolution, resolution), np.float32)
    for index in range(int(rng.integers(2, 6))):
        beside = around[int(rng.integers(len(around)))][:2] if around and index % 2 else None
        centre = beside or _place(rng, eye, 0.15, 0.95)
        sigma = eye.disc_radius * rng.uniform(0.25, 0.65)
        field = np.maximum(field, rng.uniform(0.75, 1.0) * blob(x, y, centre, sigma))
    ragged = octaves(rng, resolution, 14, 3)
    return np.asarray(np.clip(field * (1 + 0.22 * ragged), 0, 1), np.float32)
