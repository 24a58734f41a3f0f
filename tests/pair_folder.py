"""A checked data-set folder with simple drawn vessels, for tests that need pairs but no retina.

It is written by hand after the contract of `dataset.json`, without the code that checks real uploads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np


def write_pair_folder(folder: Path, n: int = 6, size: int = 64, seed: int = 0, eyes: int | None = None) -> Path:
    """Write ``n`` registered pairs of ``size`` px: dark vessels on orange in CF, the same ones bright on dark in FA.

    ``eyes`` different eyes (default: one per pair). FA lacks a strip of its left side, so that the valid masks of the
    modalities differ. Returns ``folder``.
    """
    entries = []
    for index in range(n):
        name, eye = f"pair{index:03d}", f"eye{index % (eyes or n):03d}"
        vessels = _vessels(size, np.random.default_rng([seed, index]))
        valid_cf = np.full((size, size), 255, np.uint8)
        valid_fa = valid_cf.copy()
        valid_fa[:, : size // 8] = 0
        orange = np.array([200, 110, 60], np.float32)
        images = {
            "cf": (orange * (1 - 0.7 * vessels[..., None])).astype(np.uint8)[..., ::-1],
            "fa": np.where(valid_fa > 0, 40 + 200 * vessels, 0).astype(np.uint8),
            "valid_cf": valid_cf,
            "valid_fa": valid_fa,
        }
        for kind, image in images.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            (folder / kind / f"{name}.png").write_bytes(cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes())
        files = {kind: f"{kind}/{name}.png" for kind in images}
        sizes = {"width": size, "height": size, "registration": "given", "residual_px": None}
        entries.append({"name": name, "eye": eye, **files, **sizes})
    digest = hashlib.sha256(repr((n, size, seed, eyes)).encode()).hexdigest()
    index_file = {"format": "cffa-dataset/1", "digest": digest, "pairs": entries}
    (folder / "dataset.json").write_text(json.dumps(index_file, indent=1))
    return folder


def _vessels(size: int, random: np.random.Generator) -> np.ndarray:
    """A few curved lines from a random disc, ``(size, size)`` float32 in [0, 1]."""
    canvas = np.zeros((size, size), np.uint8)
    disc = random.uniform(0.3, 0.7, 2) * size
    for angle in random.uniform(0, 2 * np.pi, 6):
        bend = random.uniform(-0.5, 0.5)
        points = [
            disc + r * size * np.array([np.cos(angle + bend * r), np.sin(angle + bend * r)]) for r in (0, 0.3, 0.6)
        ]
        line = np.round(np.array(points) * 16).astype(np.int32).reshape(-1, 1, 2)
        cv2.polylines(canvas, [line], False, 255, max(1, size // 40), cv2.LINE_AA, shift=4)
    return canvas.astype(np.float32) / 255
