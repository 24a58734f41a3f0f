"""Training images of the tiny base: a memory-mapped cache of phantoms, and the crops and jitter drawn from it."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from cffa_core.data.phantom import make_phantom
from cffa_core.rng import derive_seed

Pair = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], dict[str, str]]  # cf, fa, captions
Progress = Callable[[str, int, int, float], None]


@dataclass(frozen=True)
class Phantoms:
    """The phantom cache: memory-mapped uint8 ``cf`` (N, H, W, 3), ``fa`` (N, H, W), and the captions of both."""

    cf: npt.NDArray[np.uint8]
    fa: npt.NDArray[np.uint8]
    captions: list[dict[str, str]]

    def image(self, index: int) -> npt.NDArray[np.uint8]:
        """Image ``index`` of 2N as (H, W, 3): even ones are CF, odd ones the FA repeated three times."""
        if index % 2 == 0:
            return np.asarray(self.cf[index // 2])
        return np.repeat(self.fa[index // 2][..., None], 3, axis=2)

    def caption(self, index: int) -> str:
        """Caption of image ``index``."""
        return self.captions[index // 2]["fa" if index % 2 else "cf"]


def cache_phantoms(folder: Path, split: str, count: int, resolution: int, seed: int, progress: Progress) -> Phantoms:
    """Make ``count`` phantoms into ``folder`` as .npy files, on all cores; read them back where they exist."""
    place = folder / f"{split}-{count}x{resolution}-seed{seed}"
    paths = place / "cf.npy", place / "fa.npy", place / "captions.json"
    if not paths[2].exists():
        place.mkdir(parents=True, exist_ok=True)
        cf = np.lib.format.open_memmap(paths[0], "w+", np.uint8, (count, resolution, resolution, 3))
        fa = np.lib.format.open_memmap(paths[1], "w+", np.uint8, (count, resolution, resolution))
        make = partial(_make_arrays, seed, split, resolution)
        captions = []
        with ExitStack() as stack:
            made: Iterable[Pair] = map(make, range(count))
            if count > 16:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 16)))
                made = pool.imap(make, range(count), chunksize=4)
            for index, (cf[index], fa[index], caption) in enumerate(made):
                captions.append(caption)
                progress(f"phantoms-{split}", index + 1, count, 0.0)
        cf.flush()
        fa.flush()
        paths[2].write_text(json.dumps(captions), encoding="utf-8")
    captions = json.loads(paths[2].read_text(encoding="utf-8"))
    return Phantoms(np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r"), captions)


def _make_arrays(seed: int, split: str, resolution: int, index: int) -> Pair:
    phantom = make_phantom(derive_seed(seed, "tiny", split, index), resolution)
    return phantom.cf, phantom.fa, {"cf": phantom.cf_caption, "fa": phantom.fa_caption}


def crops(phantoms: Phantoms, rng: np.random.Generator, count: int, size: int) -> torch.Tensor:
    """Random crops, half of them from the half-size image; (B, 3, size, size) in -1..1, none of them all black."""
    out: list[npt.NDArray[np.uint8]] = []
    while len(out) < count:
        image = phantoms.image(int(rng.integers(2 * len(phantoms.cf))))
        shrink = 2 if rng.random() < 0.5 and image.shape[0] >= 2 * size else 1
        room = image.shape[0] - size * shrink + 1
        top, left = rng.integers(room, size=2)
        crop = image[top : top + size * shrink, left : left + size * shrink]
        if shrink == 2:
            crop = np.asarray(cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA), np.uint8)
        if crop.mean() > 4:
            out.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 127.5 - 1


def jitter(images: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Random gamma, gain per channel and contrast, so that the VAE also serves photographs it never saw."""
    count = images.shape[0]
    strength = (torch.rand(count, 1, 1, 1, generator=draws) < 0.7).float()
    gamma = torch.exp(0.3 * strength * torch.randn(count, 1, 1, 1, generator=draws))
    gain = torch.exp(strength * 0.16 * torch.randn(count, 3, 1, 1, generator=draws))
    bright = torch.exp(strength * 0.16 * torch.randn(count, 1, 1, 1, generator=draws))
    grey = (images[:, :1] == images[:, 1:2]).all(dim=(1, 2, 3), keepdim=True)  # angiograms stay grey
    gain = torch.where(grey, torch.ones_like(gain), gain)
    return ((images * 0.5 + 0.5).clamp_min(0) ** gamma * gain * bright).clamp(0, 1) * 2 - 1
