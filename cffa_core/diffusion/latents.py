"""The latents that training draws from: VAE moments per pair and augmentation variant, encoded when first drawn.

The cache keeps mean and log-variance, so that every draw samples the VAE's posterior anew and nothing is frozen
silently; a flip or rotation is a variant of its own, because the VAE does not commute with them. Knows no model and no
data set: it is given the encoder and the flips as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cffa_core import rng
from cffa_core.diffusion.losses import latent_mask

Encoder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Turn = Callable[[torch.Tensor, int], torch.Tensor]
TURNS = 8


class PairImages(Protocol):
    """What the cache needs of a pair: ``cf (3, H, W)`` and ``fa (1, H, W)`` in [-1, 1], masks ``(1, H, W)`` bool."""

    @property
    def name(self) -> str: ...
    @property
    def cf(self) -> torch.Tensor: ...
    @property
    def fa(self) -> torch.Tensor: ...
    @property
    def valid_cf(self) -> torch.Tensor: ...
    @property
    def valid_fa(self) -> torch.Tensor: ...


@dataclass(frozen=True)
class Moments:
    """Posterior of one image: ``mean`` and ``logvar`` of the scaled latent ``(C, h, w)``, ``valid`` ``(1, h, w)``."""

    mean: torch.Tensor
    logvar: torch.Tensor
    valid: torch.Tensor

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Draw ``x0`` from the posterior."""
        return self.mean + torch.exp(self.logvar / 2) * torch.randn(self.mean.shape, generator=generator)


@dataclass(frozen=True)
class Variant:
    """One augmented form of a pair: which of the 8 flips/rotations (both images) and which colouring (CF only)."""

    turn: int = 0
    colour: int = 0


class LatentCache:
    """Moments of every pair of a data set, on the CPU in float32.

    At 512 px a pair takes 0.26 MB per variant. Images are encoded one by one, so that what a pair's moments are does
    not depend on when or with whom it was first drawn (a resumed run encodes in another order).
    """

    def __init__(
        self, pairs: Sequence[PairImages], encode: Encoder, turn: Turn, modalities: Sequence[str], seed: int
    ) -> None:
        self._pairs = pairs
        self._encode = encode
        self._turn = turn
        self._modalities = tuple(modalities)
        self._seed = seed
        self._known: dict[tuple[int, Variant], dict[str, Moments]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def moments(self, index: int, variant: Variant) -> dict[str, Moments]:
        """Moments of one pair in one variant, by modality."""
        key = (index, variant)
        if key not in self._known:
            self._known[key] = self._encode_pair(self._pairs[index], variant)
        return self._known[key]

    def _encode_pair(self, pair: PairImages, variant: Variant) -> dict[str, Moments]:
        found = {}
        for m in self._modalities:
            image, valid = (pair.cf, pair.valid_cf) if m == "cf" else (pair.fa.expand(3, -1, -1), pair.valid_fa)
            if m == "cf" and variant.colour:
                recoloured = colour_variant(image, self._seed, pair.name, variant.colour)
                image = torch.where(valid, recoloured, image)
            mean, logvar = self._encode(self._turn(image, variant.turn).unsqueeze(0))
            stride = image.shape[-1] // mean.shape[-1]
            cells = latent_mask(self._turn(valid, variant.turn).unsqueeze(0), stride)
            found[m] = Moments(mean[0].cpu().float(), logvar[0].cpu().float(), cells[0].cpu())
        return found


def draw_variant(generator: torch.Generator, augment: str, colour_variants: int) -> Variant:
    """Draw a variant: all flips/rotations alike (``augment="dihedral"``), the plain and K colourings alike."""
    turn = torch.randint(TURNS, (1,), generator=generator).item() if augment == "dihedral" else 0
    colour = torch.randint(colour_variants + 1, (1,), generator=generator).item() if colour_variants else 0
    return Variant(int(turn), int(colour))


def colour_variant(image: torch.Tensor, seed: int, name: str, variant: int) -> torch.Tensor:
    """Recolour a CF ``(3, H, W)`` in [-1, 1]: gain per channel, gamma and saturation, fixed by (seed, pair, variant).

    The ranges are those between fundus cameras, small enough that vessels keep their contrast.
    """
    generator = rng.generator(seed, "colour", name, variant)
    gain = 1 + 0.15 * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
    gamma = 2 ** (0.4 * (2 * torch.rand(1, generator=generator) - 1))
    saturation = 1 + 0.2 * (2 * torch.rand(1, generator=generator) - 1)
    bright = ((image + 1) / 2).clamp(0, 1) ** gamma * gain
    grey = bright.mean(0, keepdim=True)
    return (grey + saturation * (bright - grey)).clamp(0, 1) * 2 - 1
