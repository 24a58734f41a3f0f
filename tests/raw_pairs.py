"""Raw files as teams send them: small drawn pairs as image bytes, folders and zips of them."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image


def draw_pair(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """CF (H, W, 3) and FA (H, W), u8: the same few vessels, dark on orange and bright on grey, over the whole frame."""
    random = np.random.default_rng(seed)
    canvas = np.zeros((size, size), np.uint8)
    disc = random.uniform(0.3, 0.7, 2) * size
    for angle in np.linspace(0, 2 * np.pi, 9)[:-1] + random.uniform(0, 0.5, 8):
        bend = random.uniform(-0.8, 0.8)
        radii = np.linspace(0, 0.9, 12)[:, None]
        turn = angle + bend * radii
        points = disc + size * radii * np.hstack([np.cos(turn), np.sin(turn)])
        cv2.polylines(canvas, [np.round(points * 16).astype(np.int32)], False, 255, max(2, size // 60), cv2.LINE_AA, 4)
    vessels = cv2.GaussianBlur(canvas.astype(np.float32) / 255, (0, 0), 1.0)
    noise = random.normal(0, 2, (size, size))
    cf = np.stack([200 - 40 * vessels, 110 - 60 * vessels, 60 - 20 * vessels], axis=-1) + noise[..., None]
    fa = 60 + 150 * vessels + random.normal(0, 2, (size, size))
    return cf.clip(0, 255).astype(np.uint8), fa.clip(0, 255).astype(np.uint8)


def encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """Image file of pixels, written by Pillow."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pair_files(n: int = 3, size: int = 96, ending: str = "png") -> dict[str, bytes]:
    """Files of ``n`` good pairs in layout (a): name inside the data set -> content."""
    files = {}
    for index in range(n):
        cf, fa = draw_pair(index, size)
        files[f"cf/p{index}.{ending}"] = encode(cf)
        files[f"fa/p{index}.{ending}"] = encode(fa)
    return files


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files below ``folder``."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path: Path, files: dict[str, bytes] | list[tuple[str | zipfile.ZipInfo, bytes]]) -> Path:
    """Write files as a zip; a list may hold names twice, or entries with attributes of their own."""
    entries = list(files.items()) if isinstance(files, dict) else files
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path
