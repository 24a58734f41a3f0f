"""Arterial and venous trees: grown as walkers that follow the arcades round the macula, then drawn.

Geometry only: colours and dye are the renderer's business. The trunks follow a circle about the fovea that opens
temporally (the arcades), nasal trunks run radially; daughters share the parent's calibre by Murray's law
(C. D. Murray, PNAS 12:207, 1926: r0^3 = r1^3 + r2^3).
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from .anatomy import Anatomy
from .fields import Field, stream

STEP = 0.008
CELLS = 150
MIN_WIDTH = 0.0013
SUPERSAMPLE = 2
MIRROR = np.array([[-1, 1], [1, 0]], np.float32)  # x -> 1 - x as a factor and a shift


@dataclass(frozen=True)
class Branch:
    """One unbranched vessel: ``points`` (N, 2) and ``widths`` (N,), fractions of the image width."""

    points: npt.NDArray[np.float32]
    widths: npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Seedling:
    x: float
    y: float
    heading: float
    width: float
    level: int
    course: str  # "arcade", "nasal", "macular" or "free"
    turn: float  # +1: clockwise round the fovea as seen on the image, -1: the other way
    parent: int


class _Forest:
    """All vessels of one kind (arteries or veins) of one right eye; same-kind vessels do not cross."""

    def __init__(self, rng: np.random.Generator, eye: Anatomy, mirrored: bool, tortuosity: float) -> None:
        flip = (lambda p: (1 - p[0], p[1])) if mirrored else (lambda p: p)
        self.rng = rng
        self.disc, self.fovea = flip(eye.disc), flip(eye.fovea)
        self.disc_radius, self.faz, self.span = eye.disc_radius, eye.faz_radius, eye.span
        self.tortuosity = tortuosity
        self.flare = rng.uniform(0.45, 0.95)
        self.quiet = eye.disc_radius * rng.uniform(1.3, 2.0)  # few vessels fork on the disc itself
        self.taken: dict[tuple[int, int], int] = {}
        self.queue: list[tuple[float, int, _Seedling]] = []
        self.branches: list[Branch] = []
        self.count = 0

    def plant(self, seedling: _Seedling) -> None:
        self.count += 1
        heapq.heappush(self.queue, (-seedling.width, self.count, seedling))

    def grow(self) -> list[Branch]:
        while self.queue and len(self.branches) < 420:
            _, ident, seedling = heapq.heappop(self.queue)
            self._walk(ident, seedling)
        return self.branches

    def _desired(self, s: _Seedling, x: float, y: float, heading: float) -> tuple[float, float]:
        """Direction the vessel would like to take at (x, y), and how strongly (per step)."""
        fx, fy = x - self.fovea[0], y - self.fovea[1]
        to_fovea = math.hypot(fx, fy)
        if s.course == "arcade":
            around = abs(math.atan2(fy, fx))  # 0 towards the disc, pi on the temporal side
            opening = -0.22 + (self.flare + 0.22) * min(1.0, max(0.0, (around - 0.9) / 1.2))
            if around > 2.3:  # past the macula the arcade runs on straight
                return heading, 0.0
            ux, uy = fx / to_fovea, fy / to_fovea
            tx, ty = (uy, -ux) if s.turn < 0 else (-uy, ux)
            return math.atan2(ty + opening * uy, tx + opening * ux), 0.16
        if s.course == "nasal":
            return math.atan2((y - self.disc[1]), 1.25 * (x - self.disc[0]) + 0.05), 0.07
        if s.course == "macular":
            if to_fovea < 2.6 * self.faz:
                return heading, 0.0
            return math.atan2(-fy, -fx), 0.03
        if to_fovea < 0.3 * self.span:
            return math.atan2(fy, fx), 0.02
        return heading, 0.0

    def _walk(self, ident: int, s: _Seedling) -> None:
        rng = self.rng
        x, y, heading, width = s.x, s.y, s.heading, s.width
        points, widths = [(x, y)], [width]
        swing = 0.0
        reach = rng.uniform(14, 34) * (1.4 + 2.2 * min(1.0, width / 0.005)) / (1 + 0.2 * s.level)
        limit = 190 if s.level == 0 else int(reach)
        jitter = rng.standard_normal(limit) * self.tortuosity * (0.6 if s.level == 0 else 1.0)
        chance = rng.random(limit)
        since, side = 0, 1.0 if rng.random() < 0.5 else -1.0
        spacing = rng.uniform(6, 12)
        taper = math.exp(-STEP * (0.75 if s.level == 0 else 1.6))
        for index in range(limit):
            desired, pull = self._desired(s, x, y, heading)
            swing = 0.8 * swing + jitter[index]
            heading += swing + pull * math.sin(desired - heading)
            x, y = x + STEP * math.cos(heading), y + STEP * math.sin(heading)
            width *= taper
            if not (-0.04 < x < 1.04 and -0.04 < y < 1.04) or width < MIN_WIDTH:
                break
            if math.hypot(x - self.fovea[0], y - self.fovea[1]) < self.faz * (1.25 + 2.0 * (s.level == 0)):
                break
            cell = (int(x * CELLS), int(y * CELLS))
            owner = self.taken.get(cell, ident)
            from_disc = math.hypot(x - self.disc[0], y - self.disc[1])
            if owner != ident and not (owner == s.parent and index < 4) and from_disc > 1.2 * self.disc_radius:
                break
            if from_disc > self.disc_radius:
                self.taken[cell] = ident
            points.append((x, y))
            widths.append(width)
            since += 1
            if since > spacing and chance[index] < 0.35 and from_disc > self.quiet and s.level < 5:
                width, heading = self._fork(ident, s, x, y, heading, width, side)
                side, since, spacing = -side if rng.random() < 0.75 else side, 0, rng.uniform(4, 11)
        if len(points) > 3:
            self.branches.append(Branch(np.array(points, np.float32), np.array(widths, np.float32)))

    def _fork(
        self, ident: int, s: _Seedling, x: float, y: float, heading: float, width: float, side: float
    ) -> tuple[float, float]:
        """Plant a daughter at (x, y); return the continuing vessel's width and heading (Murray's law)."""
        share = self.rng.uniform(0.34, 0.66) if s.level == 0 else self.rng.uniform(0.5, 0.85)
        daughter = width * share
        rest = (max(width**3 - daughter**3, 0.0)) ** (1 / 3)
        angle = side * self.rng.uniform(0.45, 1.05)
        course = "free"
        if s.course == "arcade":
            towards = math.atan2(self.fovea[1] - y, self.fovea[0] - x)
            course = "macular" if math.cos(heading + angle - towards) > 0.3 else "free"
        elif s.course == "macular":
            course = "macular" if self.rng.random() < 0.35 else "free"
        self.plant(_Seedling(x, y, heading + angle, daughter, s.level + 1, course, s.turn, ident))
        return rest, heading - 0.22 * angle * share


def _trunks(forest: _Forest, rng: np.random.Generator, vein: bool, scale: float) -> None:
    """Plant the four arcade trunks and a few small radial vessels of a right eye on the disc."""
    cx, cy = forest.disc
    shift = rng.uniform(0.10, 0.3) * (1 if vein else -1)
    calibre = (0.0126 if vein else 0.0094) * scale

    def plant(angle: float, width: float, course: str, turn: float) -> None:
        start = rng.uniform(0.0, 0.12) * forest.disc_radius
        x, y = cx + start * math.cos(angle), cy + start * math.sin(angle)
        forest.plant(_Seedling(x, y, angle, width, 0 if course != "macular" else 1, course, turn, -1))

    for sign in (-1.0, 1.0):  # -1: superior (y upwards on the image), +1: inferior
        temporal = sign * (math.pi / 2 + rng.uniform(0.0, 0.25) + shift)
        plant(temporal, calibre * rng.uniform(0.9, 1.08), "arcade", sign)
        nasal = sign * (math.pi / 2 - rng.uniform(0.55, 0.85) + 0.8 * shift)
        plant(nasal, calibre * rng.uniform(0.6, 0.75), "nasal", sign)
    for _ in range(int(rng.integers(1, 3))):
        plant(math.pi + rng.uniform(-0.55, 0.55), calibre * rng.uniform(0.26, 0.36), "macular", 0.0)
    for _ in range(int(rng.integers(1, 3))):
        plant(rng.uniform(-0.5, 0.5), calibre * rng.uniform(0.3, 0.42), "nasal", 0.0)


def grow_trees(seed: int, eye: Anatomy) -> tuple[list[Branch], list[Branch]]:
    """Grow the (arteries, veins) of one eye; about 100-400 branches each."""
    shared = stream(seed, "calibre")
    scale = shared.uniform(0.85, 1.15) * eye.span / 0.345
    tortuosity = shared.uniform(0.022, 0.05)
    mirrored = eye.eye == "OS"
    trees = []
    for kind in ("artery", "vein"):
        rng = stream(seed, kind)
        forest = _Forest(rng, eye, mirrored, tortuosity * (1.0 if kind == "artery" else 1.15))
        _trunks(forest, rng, kind == "vein", scale)
        branches = forest.grow()
        if mirrored:
            branches = [Branch(b.points * MIRROR[0] + MIRROR[1], b.widths) for b in branches]
        trees.append(branches)
    return trees[0], trees[1]


def draw(branches: list[Branch], resolution: int, *, calibre: float = 1.0, thin_level: float = 0.5) -> Field:
    """Coverage map of the branches, (H, W) in 0..1; sub-pixel vessels are drawn thin and faint.

    ``calibre`` scales all widths (0.35 draws the central reflex); ``thin_level`` is the value of the thinnest vessels.
    """
    size = resolution * SUPERSAMPLE
    canvas = np.zeros((size, size), np.uint8)
    pieces: list[tuple[float, npt.NDArray[np.int32]]] = []
    for branch in branches:
        fixed = np.round((branch.points * size - 0.5) * 16).astype(np.int32)
        pieces.extend(
            (float(branch.widths[at : at + 5].mean()), fixed[at : at + 5]) for at in range(0, len(fixed) - 1, 4)
        )
    pieces.sort(key=lambda piece: piece[0])
    for width, points in pieces:
        pixels = width * calibre * size
        thickness = max(1, round(pixels))
        level = min(1.0, max(thin_level, width / 0.0055)) * min(1.0, pixels / thickness)
        cv2.polylines(canvas, [points.reshape(-1, 1, 2)], False, round(255 * level), thickness, cv2.LINE_AA, 4)
    small = cv2.resize(canvas, (resolution, resolution), interpolation=cv2.INTER_AREA)
    return np.asarray(small, np.float32) / np.float32(255)
