"""The latents that training draws from: VAE moments per pair and augmentation variant, encoded when first drawn.

The cache keeps mean and log-variance, so that every draw samples the VAE's posterior anew and nothing is frozen
silently; a flip or rotation is a variant of its own, because the VAE does not commute with them. Knows no model and no
data set: it is given the encoder and the flips as functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from cffa_core import rng
from cffa_core.diffusion.losses import latent_mask

Encoder = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
Turn = Callable[[torch.Tensor, int], torch.Tensor]
TURNS = 8
P = TypeVar("P")


@dataclass(frozen=True)
class View:
    """An augmented pair: ``cf (3, H, W)`` and ``fa (1, H, W)`` in [-1, 1], masks ``(1, H, W)`` bool."""

    cf: torch.Tensor
    fa: torch.Tensor
    valid_cf: torch.Tensor
    valid_fa: torch.Tensor


# An augmented pair -> what the VAE is shown of it: per branch an image (3, H, W) and where it is valid (1, H, W).
Views = Callable[[View], Mapping[str, tuple[torch.Tensor, torch.Tensor]]]


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
    """Moments of every pair of a data set, on the CPU in float32, one for each branch that ``views`` shows.

    At 512 px a pair takes 0.26 MB per variant. Images are encoded one by one, so that what a pair's moments are does
    not depend on when or with whom it was first drawn (a resumed run encodes in another order).
    """

    def __init__(self, pairs: Sequence[PairImages], encode: Encoder, turn: Turn, views: Views, seed: int) -> None:
        self._pairs = pairs
        self._encode = encode
        self._turn = turn
        self._views = views
        self._seed = seed
        self._known: dict[tuple[int, Variant], dict[str, Moments]] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def moments(self, index: int, variant: Variant) -> dict[str, Moments]:
        """Moments of one pair in one variant, by branch."""
        key = (index, variant)
        if key not in self._known:
            self._known[key] = self._encode_pair(self._pairs[index], variant)
        return self._known[key]

    def _encode_pair(self, pair: PairImages, variant: Variant) -> dict[str, Moments]:
        cf = pair.cf
        if variant.colour:
            cf = torch.where(pair.valid_cf, colour_variant(cf, self._seed, pair.name, variant.colour), cf)
        turned = View(*(self._turn(x, variant.turn) for x in (cf, pair.fa, pair.valid_cf, pair.valid_fa)))
        found = {}
        for branch, (image, valid) in self._views(turned).items():
            mean, logvar = self._encode(image.unsqueeze(0))
            cells = latent_mask(valid.unsqueeze(0), image.shape[-1] // mean.shape[-1])
            found[branch] = Moments(mean[0].cpu().float(), logvar[0].cpu().float(), cells[0].cpu())
        return found


class StructureCache(Generic[P]):
    """Control images of every pair of a data set, ``(3, H, W)`` uint8 by name; made when first asked for."""

    def __init__(self, pairs: Sequence[P], structure: Callable[[P], dict[str, torch.Tensor]], turn: Turn) -> None:
        self._pairs = pairs
        self._structure = structure
        self._turn = turn
        self._known: dict[int, dict[str, torch.Tensor]] = {}

    def of(self, index: int, turned: int = 0) -> dict[str, torch.Tensor]:
        """Those of one pair, flipped and rotated as its images are."""
        if index not in self._known:
            self._known[index] = self._structure(self._pairs[index])
        return {name: self._turn(image, turned) for name, image in self._known[index].items()}


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
