"""Eyes for the classifier of findings: a memory-mapped cache of phantoms, what a VAE makes of them, and their crops.

Findings are drawn one by one, each in about half of the eyes, so that nothing can be told from the company it keeps.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cffa_core.data.phantom import FINDINGS, make_phantom
from cffa_core.evaluation.findings import CELL, MODALITIES, SEEN, SIDE, Modality
from cffa_core.models.base import Base
from cffa_core.rng import derive_seed

from .pretrain_data import jitter

Bytes = npt.NDArray[np.uint8]
Progress = Callable[[str, int, int, float], None]
Condition = tuple[int, bool]  # side of the image, and whether it went through the VAE
CONDITIONS: tuple[Condition, ...] = tuple((side, vae) for side in (512, 256, 128) for vae in (False, True))


@dataclass(frozen=True)
class Eyes:
    """Cached eyes: images ``cf`` (N, S, S, 3) and ``fa`` (N, S, S) u8, ``cells`` (N, 4, S/8, S/8) u8 in 0..1.

    ``cells`` says in which cells each of FINDINGS lies, ``findings`` (N, 4) bool which of them the eye has.
    ``decoded`` holds, by modality and side, what the VAE made of the first eyes, (M, side, side, 3) u8.
    """

    cf: Bytes
    fa: Bytes
    cells: Bytes
    findings: npt.NDArray[np.bool_]
    decoded: dict[tuple[Modality, int], Bytes]

    def __len__(self) -> int:
        return len(self.findings)

    def images(self, modality: Modality, rows: Sequence[int], condition: Condition) -> torch.Tensor:
        """Images (B, 3, side, side) in [-1, 1] under ``condition``. ``IndexError`` if they were not decoded."""
        side, vae = condition
        if vae:
            stored = self.decoded[modality, side]
            return _signed(np.stack([stored[row] for row in rows]))
        whole = self.cf if modality == "cf" else self.fa
        found = []
        for row in rows:
            image = np.asarray(whole[row])
            if side != image.shape[0]:
                image = np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
            found.append(image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2))
        return _signed(np.stack(found))

    def labels(self, modality: Modality) -> npt.NDArray[np.bool_]:
        """(N, 3) bool: which of ``SEEN[modality]`` each eye has."""
        return self.findings[:, [FINDINGS.index(name) for name in SEEN[modality]]]


def cache_eyes(folder: Path, split: str, count: int, seed: int, progress: Progress, *, side: int = SIDE) -> Eyes:
    """Make ``count`` eyes into ``folder`` as .npy files; read them back where they exist. Nothing decoded yet."""
    place = folder / f"{split}-{count}x{side}-seed{seed}"
    paths = {name: place / f"{name}.npy" for name in ("cf", "fa", "cells")}
    if not (place / "findings.json").exists():
        place.mkdir(parents=True, exist_ok=True)
        shapes = {"cf": (side, side, 3), "fa": (side, side), "cells": (4, side // CELL, side // CELL)}
        maps = {
            name: np.lib.format.open_memmap(paths[name], "w+", np.uint8, (count, *shape))
            for name, shape in shapes.items()
        }
        make = partial(_make_eye, seed, split, side)
        rows = []
        with ExitStack() as stack:
            made: Iterable[tuple[dict[str, Bytes], list[str]]] = map(make, range(count))
            if count > 16:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(2))
                made = pool.imap(make, range(count), chunksize=4)
            for index, (images, chosen) in enumerate(made):
                for name, image in images.items():
                    maps[name][index] = image
                rows.append(chosen)
                progress(f"eyes-{split}", index + 1, count, 0.0)
        for written in maps.values():
            written.flush()
        (place / "findings.json").write_text(json.dumps(rows), encoding="utf-8")
    names = json.loads((place / "findings.json").read_text(encoding="utf-8"))
    findings = np.array([[name in row for name in FINDINGS] for row in names], np.bool_)
    arrays = {name: np.load(path, mmap_mode="r") for name, path in paths.items()}
    return Eyes(arrays["cf"], arrays["fa"], arrays["cells"], findings, {})


def drawn_findings(seed: int, split: str, index: int) -> frozenset[str]:
    """Findings of one eye: each with a chance of one half, whatever the others are."""
    rng = np.random.default_rng(derive_seed(seed, "findings", split, index, "which"))
    return frozenset(name for name, chance in zip(FINDINGS, rng.random(len(FINDINGS)), strict=True) if chance < 0.5)


def _make_eye(seed: int, split: str, side: int, index: int) -> tuple[dict[str, Bytes], list[str]]:
    cv2.setNumThreads(1)
    chosen = drawn_findings(seed, split, index)
    phantom = make_phantom(derive_seed(seed, "findings", split, index), side, findings=chosen)
    cells = np.stack([_cells(phantom.masks[name]) for name in FINDINGS])
    return {"cf": phantom.cf, "fa": phantom.fa, "cells": cells}, sorted(chosen)


def _cells(mask: npt.NDArray[np.bool_]) -> Bytes:
    """1 where any pixel of a cell is marked."""
    height, width = mask.shape
    blocks = mask.reshape(height // CELL, CELL, width // CELL, CELL)
    return np.asarray(blocks.any(axis=(1, 3)), np.uint8)


def decode_eyes(
    folder: Path, split: str, eyes: Eyes, counts: Mapping[int, int], seed: int, base: Base, progress: Progress
) -> Eyes:
    """Send the first ``counts[side]`` eyes through the base's VAE at each side; kept in ``folder``; eyes with them."""
    found: dict[tuple[Modality, int], Bytes] = {}
    for side, count in counts.items():
        for modality in MODALITIES:
            path = folder / f"{split}-{len(eyes)}-seed{seed}-decoded-{modality}-{side}x{count}.npy"
            if not path.exists():
                _decode(path.with_suffix(".partial.npy"), eyes, modality, side, count, base, progress)
                path.with_suffix(".partial.npy").replace(path)
            found[modality, side] = np.load(path, mmap_mode="r")
    return Eyes(eyes.cf, eyes.fa, eyes.cells, eyes.findings, found)


@torch.no_grad()
def _decode(path: Path, eyes: Eyes, modality: Modality, side: int, count: int, base: Base, progress: Progress) -> None:
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (count, side, side, 3))
    for index in range(count):
        images = eyes.images(modality, [index], (side, False)).to(base.device)
        # bf16 is three times faster on a CPU that has it; a grey level more or less is among the augmentations anyway.
        with torch.autocast(base.device.type, torch.bfloat16):
            image = base.decode(base.encode_images(images)[0])[0].float().cpu()
        if modality == "fa":
            image = image.mean(0, keepdim=True).expand(3, -1, -1)
        out[index] = ((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        progress(f"decoding-{modality}-{side}", index + 1, count, 0.0)
    out.flush()


def training_crops(
    eyes: Eyes, modality: Modality, rng: np.random.Generator, draws: torch.Generator, count: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Augmented crops (B, 3, size, size) in [-1, 1] and the cells of each finding, (B, 3, size/8, size/8) in 0..1.

    Each is of an eye under one of the conditions (decoded ones only of eyes that were), flipped and turned, with
    colour jitter, noise, and sometimes blurred. ``size`` must be divisible by 16.
    """
    places = [FINDINGS.index(name) for name in SEEN[modality]]
    decoded = len(next(iter(eyes.decoded.values()))) if eyes.decoded else 0
    crops: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    while len(crops) < count:
        vae = bool(decoded) and rng.random() < 0.55
        row = int(rng.integers(decoded if vae else len(eyes)))
        side = int(rng.choice([512, 256, 128], p=[0.55, 0.3, 0.15]))
        top, left = (int(at) for at in rng.integers((SIDE - size) // CELL + 1, size=2))
        y, x, part = (at * side // SIDE for at in (top * CELL, left * CELL, size))
        crop = eyes.images(modality, [row], (side, vae))[..., y : y + part, x : x + part]
        crop = F.interpolate(crop, size=(size, size), mode="bilinear", align_corners=False)
        if crop.mean() < -0.95:
            continue
        here = np.array(eyes.cells[row])[places, top : top + size // CELL, left : left + size // CELL]
        target = torch.from_numpy(here)[None].float()
        turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
        crops.append(_turned(crop, turns, mirrored))
        targets.append(_turned(target, turns, mirrored))
    images = jitter(torch.cat(crops), draws)
    if rng.random() < 0.3:
        sigma = float(rng.uniform(0.4, 1.2))
        images = _blurred(images, sigma)
    noise = 0.04 * torch.rand(count, 1, 1, 1, generator=draws) * torch.randn(images.shape, generator=draws)
    return (images + noise).clamp(-1, 1), torch.cat(targets)


def _turned(x: torch.Tensor, turns: int, mirrored: bool) -> torch.Tensor:
    return torch.rot90(x.flip(-1) if mirrored else x, turns, dims=(-2, -1))


def _blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    at = torch.arange(-3, 4, dtype=torch.float32)
    line = torch.exp(-(at**2) / (2 * sigma**2))
    line = (line / line.sum()).expand(3, 1, 1, 7)
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    across = F.conv2d(padded, line, groups=3)
    return F.conv2d(across, line.transpose(2, 3), groups=3)


def _signed(images: Bytes) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
