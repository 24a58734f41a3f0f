"""The losses of METHODS 6 (Break-A-Scene, Avrahami et al. 2023, arXiv:2305.16311), and masks on a grid of cells.

Pure functions on tensors; which tokens a step has, and what their masks are, is the business of
`methods.masked_attention`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# Of the largest attention: below it an attention map is nothing, and dividing by it would give infinity.
LEAST_ATTENTION = 1e-8


def cells_of(mask: torch.Tensor, side: int) -> torch.Tensor:
    """A pixel mask ``(..., H, W)`` bool at the latent: ``(..., side, side)`` bool, True where ANY pixel is marked.

    A microaneurysm is smaller than a cell; taking the nearest pixel instead would lose most of them.
    """
    flat = mask.reshape(1, -1, *mask.shape[-2:]).float()
    return F.adaptive_max_pool2d(flat, side).reshape(*mask.shape[:-2], side, side) > 0


def attention_target(mask: torch.Tensor, side: int) -> torch.Tensor:
    """A pixel mask ``(..., H, W)`` bool as what attention should be: ``(..., side, side)`` float32, largest value 1.

    The marked share of each cell over the largest share, as the attention is divided by its own largest value: thin
    vessels are a pattern at 16x16 too, where every cell of the arcades holds some. All 0 for an empty mask.
    """
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    share = F.adaptive_avg_pool2d(flat, side)
    target = share / share.amax((-2, -1), keepdim=True).clamp(min=LEAST_ATTENTION)
    return target.reshape(*mask.shape[:-2], side, side)


def masked_noise_loss(predicted: torch.Tensor, noise: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``mean |M * (eps - eps_hat)|^2`` over ALL cells of ``(B, C, h, w)``; ``mask (B, 1, h, w)`` bool.

    Cells outside the mask count as 0 in the mean, as in the paper: a small structure weighs little.
    """
    return (mask * (noise - predicted)).square().mean()


def attention_loss(maps: torch.Tensor, targets: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """``sum over chosen tokens of MSE(target, A / max A)``, mean over rows.

    ``maps`` and ``targets`` are ``(B, T, s, s)``, ``chosen (B, T)`` bool. The gradient goes through the largest value
    too, as in the paper's program.
    """
    relative = maps / maps.amax((-2, -1), keepdim=True).clamp(min=LEAST_ATTENTION)
    each = (relative - targets).square().mean((-2, -1))
    return (each * chosen).sum(1).mean()


def overlap(attention: torch.Tensor, target: torch.Tensor) -> float:
    """IoU of a map ``(s, s)`` with its target: as many of the map's largest cells as the target has at 0.5 or more.

    A map that knows nothing of the mask reaches about ``k / (2 s^2 - k)`` with k marked cells. NaN for an empty target.
    """
    marked = target.flatten() >= 0.5
    count = int(marked.sum())
    if count == 0:
        return float("nan")
    found = torch.zeros_like(marked)
    found[attention.flatten().topk(count).indices] = True
    return float((found & marked).sum() / (found | marked).sum())
