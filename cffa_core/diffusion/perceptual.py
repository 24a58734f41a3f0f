"""LPIPS with VGG16, the optional pixel-space term of METHODS 2, in plain torch.

Zhang et al. 2018, arXiv:1801.03924. The weights are ONE safetensors file that the user gives (``CFFA_LPIPS_WEIGHTS``);
nothing is downloaded. It holds exactly

- ``features.N.weight (C_out, C_in, 3, 3)`` and ``features.N.bias (C_out,)``, N of :data:`BLOCKS`, named as in
  torchvision's ``vgg16``;
- ``lin0.weight`` ... ``lin4.weight``, each ``(1, C, 1, 1)`` and not negative, from version 0.1 of ``lpips``.

How to write it is in docs/methods.md, section 2. Knows no base and no schedule: the decoder is given as a function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch.nn import functional as F

from cffa_core.diffusion.losses import PRED_X0_LIMIT, latent_mask, masked_mean
from cffa_core.errors import CorruptArtifact, ModelUnavailable

# The convolutions of VGG16 (index in torchvision's `features`, output channels), by the pooling between them; the ReLU
# that ends a block is a tap: relu1_2, relu2_2, relu3_3, relu4_3, relu5_3.
BLOCKS: tuple[tuple[tuple[int, int], ...], ...] = (
    ((0, 64), (2, 64)),
    ((5, 128), (7, 128)),
    ((10, 256), (12, 256), (14, 256)),
    ((17, 512), (19, 512), (21, 512)),
    ((24, 512), (26, 512), (28, 512)),
)
# ImageNet's mean and deviation, in units of images in [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Under the root, so that a place where no feature fires has a gradient (0) instead of a NaN.
NORM_FLOOR = 1e-8

Decoder = Callable[[torch.Tensor], torch.Tensor]


class Lpips:
    """The distance and its weights; ``sha256`` is the digest of their file."""

    def __init__(self, weights: Mapping[str, torch.Tensor], sha256: str) -> None:
        self.weights = dict(weights)
        self.sha256 = sha256

    @classmethod
    def load(cls, path: Path | None, device: str | torch.device = "cpu") -> Self:
        """Read the weight file to ``device``.

        Raises ``ModelUnavailable`` if there is none or its tensors are not those listed above, naming them, and
        ``CorruptArtifact`` if it is no safetensors file.
        """
        if path is None or not path.is_file():
            raise ModelUnavailable(
                (
                    "lpips_lambda > 0 needs the weights of LPIPS"
                    if path is None
                    else f"there are no LPIPS weights at {path}"
                )
                + "; point CFFA_LPIPS_WEIGHTS (or lpips_weights) to a safetensors file made as in docs/methods.md, "
                "section 2, or set lpips_lambda to 0"
            )
        content = path.read_bytes()
        try:
            tensors = load(content)
        except SafetensorError as error:
            raise CorruptArtifact(f"the LPIPS weights {path.name} are no readable safetensors file: {error}") from error
        _check(tensors, path.name)
        weights = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
        return cls(weights, hashlib.sha256(content).hexdigest())

    def distance(self, a: torch.Tensor, b: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Distance ``(B,)`` of images ``(B, 3, H, W)`` around [-1, 1]: a mean over the ``valid (B, 1, H, W)`` pixels.

        At each tap a cell counts if ALL pixels under it are valid; taps are added, one without any such cell adds 0.
        """
        total = torch.zeros(len(a), device=a.device)
        for tap, (features_a, features_b) in enumerate(zip(self._taps(a), self._taps(b), strict=True)):
            difference = (_unit(features_a) - _unit(features_b)).square()
            cells = latent_mask(valid, 2**tap)
            total = total + masked_mean(F.conv2d(difference, self.weights[f"lin{tap}.weight"]), cells)
        return total

    def _taps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features ``(B, C, H / 2^i, W / 2^i)`` at the end of block i."""
        x = (images - images.new_tensor(SHIFT).view(1, 3, 1, 1)) / images.new_tensor(SCALE).view(1, 3, 1, 1)
        taps: list[torch.Tensor] = []
        for block in BLOCKS:
            x = F.max_pool2d(x, 2) if taps else x
            for index, _ in block:
                x = F.relu(
                    F.conv2d(
                        x, self.weights[f"features.{index}.weight"], self.weights[f"features.{index}.bias"], padding=1
                    )
                )
            taps.append(x)
        return taps


def latent_distance(
    lpips: Lpips, decode: Decoder, pred_x0: torch.Tensor, x0: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """LPIPS ``(B,)`` between the decoded ``pred_x0`` and the decoded ``x0``, latents ``(B, C, h, w)``.

    The target is the decoded x0 and not the photograph: what the frozen VAE loses is not the LoRA's to mend, and a
    perfect prediction scores 0. Cells that are not ``valid (B, 1, h, w)`` are given the target's latent, since decoder
    and VGG see further than one cell: what was predicted there must not matter. The gradient goes to ``pred_x0`` alone.
    """
    with torch.no_grad():
        target = decode(x0)
    drawn = decode(torch.where(valid, pred_x0.clamp(-PRED_X0_LIMIT, PRED_X0_LIMIT), x0))
    stride = target.shape[-1] // x0.shape[-1]
    pixels = valid.repeat_interleave(stride, dim=2).repeat_interleave(stride, dim=3)
    return lpips.distance(drawn, target, pixels)


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a weight file."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels = 3
    for tap, block in enumerate(BLOCKS):
        for index, width in block:
            shapes[f"features.{index}.weight"] = (width, channels, 3, 3)
            shapes[f"features.{index}.bias"] = (width,)
            channels = width
        shapes[f"lin{tap}.weight"] = (1, channels, 1, 1)
    return shapes


def _check(tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """Raise ``ModelUnavailable`` naming every tensor that is missing, unknown, of another shape or not usable."""
    expected = expected_shapes()
    wrong = [f"{key} is missing" for key in expected if key not in tensors]
    wrong += [f"{key} is unknown" for key in sorted(tensors) if key not in expected]
    for key, shape in expected.items():
        if key in tensors and tuple(tensors[key].shape) != shape:
            wrong.append(f"{key} has shape {tuple(tensors[key].shape)}, not {shape}")
        elif key in tensors and not torch.isfinite(tensors[key]).all():
            wrong.append(f"{key} is not finite")
        elif key in tensors and key.startswith("lin") and (tensors[key] < 0).any():
            wrong.append(f"{key} has negative weights")
    if wrong:
        raise ModelUnavailable(f"the LPIPS weights {name} do not fit VGG16: {'; '.join(wrong)}")


def _unit(features: torch.Tensor) -> torch.Tensor:
    """Scale the channels of each place to unit length."""
    length: torch.Tensor = (features.square().sum(1, keepdim=True) + NORM_FLOOR).sqrt()
    return features / length
