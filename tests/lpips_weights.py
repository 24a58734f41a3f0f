"""A weight file for LPIPS with random numbers: VGG16's names and shapes, written down here once more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# torchvision's vgg16.features: a number is a convolution and its ReLU (two places), M a pooling (one place).
VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


def random_lpips_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Convolutions scaled so that the features neither vanish nor grow with depth, `lin` weights in [0, 1)."""
    random = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    place, width, tap = 0, 3, 0
    for layer in (*VGG16, "M"):
        if layer == "M":
            tensors[f"lin{tap}.weight"] = random.random((1, width, 1, 1), dtype=np.float32)
            place, tap = place + 1, tap + 1
            continue
        weight = random.standard_normal((layer, width, 3, 3), dtype=np.float32) * np.float32((2 / (9 * width)) ** 0.5)
        tensors[f"features.{place}.weight"] = weight
        tensors[f"features.{place}.bias"] = random.standard_normal(layer, dtype=np.float32) * np.float32(0.1)
        place, width = place + 2, layer
    return tensors


def write_lpips_weights(path: Path, seed: int = 0) -> Path:
    """Write the file (59 MB) and return ``path``."""
    save_file(random_lpips_tensors(seed), path)
    return path
