"""Pictures to embeddings and back: five stride-2 convolutions, and a decoder from a 7 x 7 latent (METHODS 7).

The latent is the decoder's own projection of an embedding; here is also what standardises it. Knows no text and no
noise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cffa_core.jobs.captioned_spec import CaptionedSizes

SIDE = 224
LATENT_SIDE = 7
GROUPS = 8
SQUEEZED = 64
# How much of the latents' statistics each training step renews.
RENEWAL = 0.02


def _halving(channels: int, width: int) -> nn.Sequential:
    """Convolution 3x3 with stride 2, batch normalisation, SiLU.

    Over the batch: a normalisation of each picture by itself takes away that one has dark or bright spots more than
    others, which is what a finding is.
    """
    convolution = nn.Conv2d(channels, width, 3, 2, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.SiLU())


def _keeping(channels: int, width: int) -> nn.Sequential:
    """Convolution 3x3, group normalisation, SiLU."""
    convolution = nn.Conv2d(channels, width, 3, 1, 1)
    return nn.Sequential(convolution, nn.GroupNorm(GROUPS, width), nn.SiLU())


class Trunk(nn.Module):
    """Five stride-2 convolutions: a picture ``(B, 3, 224, 224)`` to the maps of the last four levels, 56 .. 7 wide."""

    def __init__(self, sizes: CaptionedSizes) -> None:
        super().__init__()
        widths = [sizes.image * 2**level for level in range(5)]
        self.levels = nn.ModuleList(
            _halving(channels, width) for channels, width in zip([3, *widths[:-1]], widths, strict=True)
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Maps of the last four levels, the finest first."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps[1:]


class ImageEncoder(nn.Module):
    """Embeddings of pictures: what is there (means and maxima of the trunk's maps over all places) and where.

    A finding may be one dot anywhere in the picture: a maximum over places sees it, a mean would drown it. Each number
    of an embedding is standardised over the batch (at use, by running statistics): the losses then find no way out in
    the embeddings' scale, and what all eyes have in common is not in them. With a normalisation of each embedding by
    itself, nine tenths of every embedding were the same, and the contrastive loss learnt nothing (docs/captioned.md).
    """

    def __init__(self, sizes: CaptionedSizes) -> None:
        super().__init__()
        last = sizes.image * 2**4
        self.trunk = Trunk(sizes)
        self.squeeze = nn.Conv2d(last, SQUEEZED, 1)
        found = 2 * last + SQUEEZED * LATENT_SIDE**2
        # All that is found counts alike: else the few maxima of one striking finding become the whole embedding.
        self.balance = nn.BatchNorm1d(found, affine=False)
        self.head = nn.Linear(found, sizes.embedding)
        self.norm = nn.BatchNorm1d(sizes.embedding, affine=False, momentum=0.05)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Images ``(B, 3, 224, 224)`` in [-1, 1] to the embedding ``(B, E)``, then the trunk's four maps."""
        maps = self.trunk(images)
        deep = maps[-1]
        found = torch.cat([deep.mean((2, 3)), deep.amax((2, 3)), self.squeeze(deep).flatten(1)], dim=1)
        return (self.norm(self.head(self.balance(found))), *maps)


class ImageDecoder(nn.Module):
    """Embedding ``(B, E)`` -> latent ``(B, C, 7, 7)`` by a linear map -> picture ``(B, 3, 224, 224)``."""

    def __init__(self, sizes: CaptionedSizes) -> None:
        super().__init__()
        self.channels = sizes.latent_channels
        self.projection = nn.Linear(sizes.embedding, self.channels * LATENT_SIDE**2)
        widths = [sizes.decoder // 2**level for level in range(4)]
        self.levels = nn.ModuleList(
            _keeping(channels, width) for channels, width in zip([self.channels, *widths[:-1]], widths, strict=True)
        )
        # The last doubling is a rearrangement of channels (Shi et al. 2016): a convolution at 224 x 224 costs more.
        self.to_pixels = nn.Conv2d(widths[-1], 12, 3, padding=1)

    def latent(self, embedding: torch.Tensor) -> torch.Tensor:
        """Latent ``(B, C, 7, 7)`` of embeddings, not yet standardised."""
        return torch.as_tensor(self.projection(embedding)).view(-1, self.channels, LATENT_SIDE, LATENT_SIDE)

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        """Picture of a latent; about in [-1, 1], not clamped."""
        for level in self.levels:
            latent = level(F.interpolate(latent, scale_factor=2.0, mode="nearest"))
        return F.pixel_shuffle(self.to_pixels(latent), 2)


class LatentScale(nn.Module):
    """Running statistics of the latents: a mean for each place and channel, a deviation for each channel.

    What every eye has in common (aperture, a disc somewhere) is in the mean, so that the diffusion model is left with
    what differs. Buffers: they go into the weights' file, and into the bytes of a resumed run.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    seen: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, LATENT_SIDE, LATENT_SIDE))
        self.register_buffer("deviation", torch.ones(channels, 1, 1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, latents: torch.Tensor) -> None:
        """Renew the statistics by a batch ``(B, C, 7, 7)``: plain averages at first, then RENEWAL of each batch."""
        self.seen += 1
        share = max(RENEWAL, 1 / int(self.seen))
        self.mean.lerp_(latents.mean(0), share)
        spread = (latents - self.mean).square().mean((0, 2, 3)).sqrt().clamp_min(1e-4)
        self.deviation.lerp_(spread[:, None, None], share)

    def standardise(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents with mean 0 and deviation 1."""
        return (latents - self.mean) / self.deviation

    def restore(self, standard: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`standardise`."""
        return standard * self.deviation + self.mean
