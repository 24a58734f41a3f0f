"""Light and dye: turns the fields of one eye into a colour photograph and an angiogram, with camera and noise.

Both renderers read the same geometry arrays, so the pair is registered exactly; only aperture, illumination, blur and
noise are drawn per modality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .anatomy import Anatomy, cup_field, disc_field
from .fields import Field, Mask, blob, blur, filaments, grid, octaves, smooth_noise, soft_step, stream

Phase = Literal["early", "mid", "late"]


def rgb(red: float, green: float, blue: float) -> Field:
    """A colour as a (3,) array that broadcasts over (H, W, 3)."""
    return np.array((red, green, blue), np.float32)


@dataclass(frozen=True)
class Scene:
    """Everything both modalities see; every field is (H, W) float32 in 0..1."""

    seed: int
    eye: Anatomy
    resolution: int
    artery: Field
    vein: Field
    artery_reflex: Field
    vein_core: Field
    capillaries: Field
    choroid: Field
    haemorrhage: Field
    exudate: Field
    microaneurysm: Field
    leakage: Field


def tissue(seed: int, eye: Anatomy, resolution: int) -> tuple[Field, Field]:
    """``(capillaries, choroid)``: the fine retinal net outside the foveal avascular zone, and choroidal vessels."""
    rng = stream(seed, "tissue")
    x, y = grid(resolution)
    net = np.maximum(filaments(rng, resolution, 46, 9.0), 0.8 * filaments(rng, resolution, 80, 7.0))
    distance = np.sqrt((x - eye.fovea[0]) ** 2 + (y - eye.fovea[1]) ** 2)
    outside_faz = soft_step(np.asarray(distance - 1.5 * eye.faz_radius, np.float32), 1.6 * eye.faz_radius)
    choroid = np.maximum(filaments(rng, resolution, 13, 3.2), 0.8 * filaments(rng, resolution, 20, 3.0))
    return np.asarray(net * outside_faz, np.float32), blur(choroid, 0.003 * resolution)


def _aperture(seed: int, eye: Anatomy, resolution: int, modality: str) -> Field:
    """Soft camera aperture, (H, W) in 0..1; the shape is the camera's, place and size differ a little per modality."""
    shared = stream(seed, "camera")
    kind = shared.choice(["round", "cut", "flat", "square"], p=[0.4, 0.35, 0.12, 0.13])
    radius, flat, corner = shared.uniform(0.455, 0.495), shared.uniform(0.36, 0.44), shared.random() < 0.5
    rng = stream(seed, f"aperture-{modality}")
    x, y = grid(resolution)
    cx, cy = 0.5 + rng.normal(0, 0.012), 0.5 + rng.normal(0, 0.012)
    radius *= rng.uniform(0.96, 1.02)
    distance = radius - np.sqrt((x - cx) ** 2 + (y - cy) ** 2)
    if kind == "cut":
        distance = np.minimum(distance, flat - np.abs(y - cy))
    elif kind == "flat":
        distance = np.minimum(distance, flat - (y - cy))
    elif kind == "square":
        half = 0.5 + rng.uniform(-0.04, 0.06)
        distance = np.minimum(half - np.abs(x - cx), half - np.abs(y - cy))
    if kind != "square" and corner:  # the little triangle that tells which side is up
        angle = math.pi / 4 if eye.eye == "OD" else 3 * math.pi / 4
        notch = (x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)
        across = np.abs(-(x - cx) * math.sin(angle) + (y - cy) * math.cos(angle))
        distance = np.maximum(distance, np.minimum(radius + 0.022 - notch, 0.028 - across) * (notch > 0))
    return soft_step(np.asarray(distance, np.float32), 0.006)


def _illumination(seed: int, resolution: int, modality: str, strength: float) -> Field:
    """Smooth multiplicative light field around 1: off-centre vignette plus a slow drift."""
    rng = stream(seed, f"light-{modality}")
    x, y = grid(resolution)
    cx, cy = 0.5 + rng.normal(0, 0.09), 0.5 + rng.normal(0, 0.09)
    fall = ((x - cx) ** 2 + (y - cy) ** 2) / 0.25
    drift = 0.09 * smooth_noise(rng, resolution, 3)
    return np.asarray(np.clip(1.08 - strength * rng.uniform(0.5, 1.2) * fall + drift, 0.12, 1.5), np.float32)


def _arcade_sheen(eye: Anatomy, resolution: int) -> Field:
    """Nerve-fibre-layer reflex: bright fans above and below the disc on the temporal side; (H, W) in 0..1."""
    x, y = grid(resolution)
    dx, dy = x - np.float32(eye.disc[0]), y - np.float32(eye.disc[1])
    side = 1.0 if eye.eye == "OS" else -1.0
    angle = np.arctan2(np.abs(dy), side * dx)
    radius = np.sqrt(dx**2 + dy**2) / eye.disc_radius
    return np.asarray(np.exp(-(((angle - 1.1) / 0.45) ** 2) - ((radius - 1.6) / 1.4) ** 2), np.float32)


def _finish(
    image: Field, aperture: Field, rng: np.random.Generator, sigma: float, noise: float
) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Blur, add sensor noise, close the aperture; (8-bit image, valid mask). Black outside the mask."""
    resolution = image.shape[0]
    valid = aperture > 0.5
    image = blur(image, sigma * resolution / 512)
    grain = rng.standard_normal(image.shape, dtype=np.float32)
    image = image + np.float32(noise) * (np.float32(0.35) + np.sqrt(np.clip(image, 0, 1))) * grain
    shade = aperture * valid
    image = np.asarray(image * (shade[..., None] if image.ndim == 3 else shade), np.float32)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8), valid


def render_cf(scene: Scene) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Colour fundus photograph, (H, W, 3) uint8 RGB, and its valid mask (H, W)."""
    eye, size = scene.eye, scene.resolution
    rng = stream(scene.seed, "cf")
    x, y = grid(size)
    pigment = np.array(eye.pigment, np.float32) * np.float32(rng.uniform(0.82, 1.05))
    image = np.broadcast_to(pigment, (size, size, 3)).astype(np.float32)

    mottle = octaves(rng, size, 9, 4)
    grain = octaves(rng, size, 70, 2)
    image *= (1 + 0.05 * mottle + 0.022 * grain)[..., None]
    choroid = (scene.choroid - 0.35) * eye.tessellation
    image *= 1 + choroid[..., None] * rgb(0.22, 0.38, 0.25)

    macula = blob(x, y, eye.fovea, eye.macula_radius)
    foveola = blob(x, y, eye.fovea, 0.42 * eye.macula_radius)
    depth = rng.uniform(0.6, 1.15)
    image *= 1 - depth * (macula[..., None] * rgb(0.13, 0.25, 0.3) + foveola[..., None] * rgb(0.16, 0.26, 0.26))
    sheen = _arcade_sheen(eye, size) * rng.uniform(0.02, 0.13)
    image += sheen[..., None] * rgb(0.5, 0.9, 0.7)

    disc, cup = disc_field(eye, size), cup_field(eye, size)
    halo = blob(x, y, eye.disc, 1.25 * eye.disc_radius) * (1 - disc)
    image *= 1 + rng.uniform(-0.2, 0.25) * halo[..., None]
    pale = eye.disc_paleness
    rim = pigment * rgb(1.2, 1.6, 1.65) * (1 - 0.65 * pale) + rgb(1.0, 0.84, 0.56) * (0.65 * pale)
    rim = np.minimum(rim, 0.97).astype(np.float32)
    cup_colour = np.minimum(rim * rgb(1.1, 1.3, 1.5), 1.0)
    target = rim + cup[..., None] * (cup_colour - rim)
    image += disc[..., None] * 0.92 * (target * (1 + 0.03 * mottle[..., None]) - image)

    spots = scene.exudate
    image += spots[..., None] * 0.88 * (rgb(0.97, 0.86, 0.48) - image)

    strength = rng.uniform(0.75, 1.1)
    image *= 1 - 0.12 * strength * scene.capillaries[..., None] * rgb(0.1, 0.5, 0.4)
    image *= 1 - strength * scene.vein[..., None] * rgb(0.36, 0.60, 0.50)
    image *= 1 - strength * scene.artery[..., None] * rgb(0.13, 0.47, 0.44)
    reflex = scene.artery_reflex * rng.uniform(0.1, 0.3)
    image += reflex[..., None] * rgb(0.55, 0.6, 0.5) * image.mean(axis=2, keepdims=True)

    blood = scene.haemorrhage * (1 + 0.12 * grain)
    image *= 1 - np.clip(blood, 0, 1)[..., None] * rgb(0.48, 0.82, 0.72)
    image *= 1 - scene.microaneurysm[..., None] * rgb(0.28, 0.72, 0.62)

    image *= _illumination(scene.seed, size, "cf", 0.42)[..., None]
    edge = np.asarray(np.sqrt((x - 0.5) ** 2 + (y - 0.5) ** 2) - 0.40, np.float32)
    image += (soft_step(edge, 0.16) * rng.uniform(-0.02, 0.07))[..., None] * rgb(0.25, 0.8, 1.0)
    image *= np.float32(rng.uniform(0.95, 1.05, 3))
    return _finish(image, _aperture(scene.seed, eye, size, "cf"), rng, rng.uniform(0.3, 1.0), rng.uniform(0.006, 0.02))


# Brightness of (artery, vein wall, vein core, background, capillaries, disc, leak) per phase, 0..1.
_DYE: dict[Phase, tuple[float, float, float, float, float, float, float]] = {
    "early": (0.80, 0.50, 0.20, 0.15, 0.10, 0.20, 0.10),
    "mid": (0.78, 0.86, 0.86, 0.25, 0.20, 0.42, 0.45),
    "late": (0.45, 0.50, 0.50, 0.27, 0.07, 0.62, 0.95),
}


def render_fa(scene: Scene, phase: Phase) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Angiogram of ``phase``, (H, W) uint8, and its valid mask (H, W)."""
    eye, size = scene.eye, scene.resolution
    rng = stream(scene.seed, "fa")
    x, y = grid(size)
    artery, wall, core, ground, fine, disc_level, leak = _DYE[phase]
    ground *= rng.uniform(0.75, 1.3)
    gain = rng.uniform(0.88, 1.12)

    mottle = octaves(rng, size, 9, 4)
    grain = octaves(rng, size, 90, 2)
    patchy = 0.45 if phase == "early" else 0.10
    image = ground * (1 + 0.09 * mottle + 0.07 * grain)
    image *= 1 + patchy * (scene.choroid - 0.4) * (0.5 + eye.tessellation)
    image += fine * rng.uniform(0.4, 1.0) * scene.capillaries * (0.6 + 0.4 * np.clip(mottle, -1, 1))

    macula = blob(x, y, eye.fovea, 0.8 * eye.macula_radius)
    foveola = blob(x, y, eye.fovea, 0.36 * eye.macula_radius)
    image *= (1 - 0.55 * macula) * (1 - 0.5 * foveola)

    disc, cup = disc_field(eye, size), cup_field(eye, size)
    stain = disc_level * (1 - (0.35 if phase == "late" else 0.5) * cup) * (1 + 0.1 * mottle)
    image += disc * (0.9 * (stain - image))
    if phase == "late":
        image += 0.10 * blob(x, y, eye.disc, 1.2 * eye.disc_radius) * (1 - disc)

    vein = wall + scene.vein_core * (core - wall)
    image += scene.vein * (vein * gain - image)
    image += scene.artery * (artery * gain - image)

    dots = {"early": 0.4, "mid": 0.85, "late": 0.7}[phase]
    image += scene.microaneurysm * (np.maximum(dots, image) - image)
    image *= 1 - 0.35 * scene.exudate
    image += scene.leakage * np.clip(leak - image, 0, 1)
    image *= 1 - 0.86 * np.clip(scene.haemorrhage, 0, 1)

    image = image * _illumination(scene.seed, size, "fa", 0.5)
    return _finish(
        np.asarray(image, np.float32),
        _aperture(scene.seed, eye, size, "fa"),
        rng,
        rng.uniform(0.3, 0.95),
        rng.uniform(0.01, 0.032),
    )
