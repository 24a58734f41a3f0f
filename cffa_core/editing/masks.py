"""Where an edit acts: masks from cross-attention and from the guidance itself, joined over both modalities (METHODS 5).

Masks are float32, 1 where the edit acts and 0 elsewhere, on the cells of the latent. ``within`` restricts an edit to an
area that the user drew: the quantiles are then taken inside it, or the brightest tenth of the picture might miss it
wholly. Knows no UNet and no solver.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

MaskMode = Literal["cf", "fa", "intersection", "union"]

# Above this timestep the guidance is too noisy to say where it belongs (LEDITS++): attention alone decides.
GUIDANCE_MASK_FROM = 800

SMOOTHING = 0.5


def attention_mask(
    maps: torch.Tensor, quantile: float, size: tuple[int, int], within: torch.Tensor | None = None
) -> torch.Tensor:
    """M1 ``(R, 1, *size)``: the cells that the words of an edit look at.

    ``maps (R, N, s, s)`` are the cross-attention maps of the N words, averaged over heads and layers. Their sum is
    smoothed (reflect padding, 3x3 Gaussian), cut at its ``quantile``, and enlarged by nearest neighbour.
    """
    summed = F.pad(maps.float().sum(dim=1, keepdim=True), (1, 1, 1, 1), mode="reflect")
    smooth = F.conv2d(summed, smoothing_kernel().to(summed))
    mask: torch.Tensor = F.interpolate(above_quantile(smooth, quantile, within), size, mode="nearest")
    return mask


def smoothing_kernel() -> torch.Tensor:
    """The ``(1, 1, 3, 3)`` Gaussian of LEDITS++: its authors write ``exp(-(d / 2 sigma)^2)`` with sigma = 0.5."""
    line = torch.exp(-((torch.arange(-1.0, 2.0) / (2 * SMOOTHING)) ** 2))
    kernel = line[:, None] * line[None, :]
    return (kernel / kernel.sum())[None, None]


def guidance_mask(guidance: torch.Tensor, quantile: float, within: torch.Tensor | None = None) -> torch.Tensor:
    """M2 ``(R, 1, h, w)``: the cells where ``guidance (R, C, h, w)`` is large, summed over channels."""
    return above_quantile(guidance.abs().sum(dim=1, keepdim=True), quantile, within)


def above_quantile(values: torch.Tensor, quantile: float, within: torch.Tensor | None = None) -> torch.Tensor:
    """1 where ``values (R, 1, s, s)`` reach the quantile of their row, else 0; ``within (h, w)`` bool bounds both."""
    if within is None:
        least = torch.quantile(values.flatten(1).float(), quantile, dim=1)
        return (values >= least[:, None, None, None]).float()
    inside = shrink(within, (values.shape[-2], values.shape[-1]))
    least = torch.quantile(values[:, 0, inside].float(), quantile, dim=1)
    return (values >= least[:, None, None, None]).float() * inside


def shrink(area: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """``(h, w)`` bool to ``size``: a cell belongs to an area if any of its pixels does."""
    return F.adaptive_max_pool2d(area[None, None].float(), size)[0, 0] > 0


def join(masks: torch.Tensor, mode: MaskMode) -> torch.Tensor:
    """The ONE mask of both images: ``masks (2, 1, h, w)``, CF's then FA's, to ``(1, 1, h, w)``."""
    cf, fa = masks[:1], masks[1:]
    if mode == "cf":
        return cf
    if mode == "fa":
        return fa
    return cf * fa if mode == "intersection" else torch.maximum(cf, fa)
