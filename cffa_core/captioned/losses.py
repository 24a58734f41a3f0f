"""The losses of the captioned model as functions of tensors (METHODS 7); each is 0 at its best and says what it wants.

Knows no module: embeddings, pictures and maps come in, numbers go out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def same_text(ids: torch.Tensor) -> torch.Tensor:
    """``(B, B)`` bool: which rows of ``ids (B, L)`` are the same text."""
    return (ids[:, None] == ids[None]).all(dim=2)


def contrastive(
    text: torch.Tensor, image: torch.Tensor, same: torch.Tensor, log_temperature: torch.Tensor
) -> torch.Tensor:
    """Symmetric contrastive loss (Radford et al. 2021) over cosines of embeddings ``(B, E)``.

    Captions repeat: every picture with the same text counts as right, with equal shares (Khosla et al. 2020). The
    entropy of these shares is taken off, so that 0 is reached when exactly the right ones are found.
    """
    cosines = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    logits = cosines * log_temperature.exp().clamp(max=100)
    shares = same.to(logits.dtype) / same.sum(dim=1, keepdim=True)
    entropy = -torch.xlogy(shares, shares).sum(dim=1).mean()
    rows = F.cross_entropy(logits, shares) + F.cross_entropy(logits.T, shares)
    return rows / 2 - entropy


def pull(bridged: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Mean square distance of a text's bridged embedding from its pictures' (which stay where they are).

    Its best is the mean embedding of all pictures with this text, which is what drawing without diffusion decodes.
    """
    return F.mse_loss(bridged, image.detach())


def reconstruction(
    drawn: torch.Tensor, images: torch.Tensor, drawn_maps: Sequence[torch.Tensor], maps: Sequence[torch.Tensor]
) -> torch.Tensor:
    """L1 of pixels, of differences between neighbours, and of the encoder's maps (Johnson et al. 2016).

    Pixels alone forget small lesions, since no pixel of a blurred picture is far off; the encoder, which has to name
    them, sees what is missing. ``drawn_maps`` are of ``drawn`` through a frozen copy of its trunk.
    """
    error = F.l1_loss(drawn, images)
    for dim in (2, 3):
        error = error + F.l1_loss(drawn.diff(dim=dim), images.diff(dim=dim))
    seen = [F.l1_loss(mine, other.detach()) for mine, other in zip(drawn_maps, maps, strict=True)]
    return error + torch.stack(seen).mean()
