"""`side_by_side` (METHODS 3): one UNet, one LoRA, and CF and FA beside each other on one canvas with one prompt.

The canvas is ``CF | FA`` along the width; by default each is squeezed to half of its width (the mean of two columns),
so that the canvas has the size of one image. It is encoded, noised and denoised as ONE image, and a sample is cut in
the middle and stretched back (bicubic).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import torch
from torch.nn import functional as F

from cffa_core.diffusion.latents import Moments, View
from cffa_core.diffusion.losses import ModalityLatents
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import Method, NoiseMode, SideBySideSpec
from cffa_core.methods.method import PairMethod


def halves(canvas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut ``(..., H, 2 W)`` into CF and FA, each ``(..., H, W)``."""
    cf, fa = canvas.chunk(2, dim=-1)
    return cf, fa


def squeeze(image: torch.Tensor) -> torch.Tensor:
    """``(C, H, W)`` to half its width by area: the mean of every two columns."""
    return F.avg_pool2d(image, (1, 2))


def stretch(image: torch.Tensor) -> torch.Tensor:
    """``(C, H, W)`` in [-1, 1] to twice its width, bicubic; what it overshoots is cut off."""
    height, width = image.shape[-2:]
    wide = F.interpolate(image.unsqueeze(0), (height, 2 * width), mode="bicubic", align_corners=False)
    return wide[0].clamp(-1, 1)


class SideBySide(PairMethod):
    """A base with one LoRA that draws both images on one canvas."""

    method = Method.SIDE_BY_SIDE

    def set_up(self) -> None:
        """Say whether images are squeezed; refuses a resolution that the cut does not fit."""
        self.squeezed = (self.settings.side_by_side or SideBySideSpec()).squeeze
        self.noise_shape(self.settings.resolution)

    @property
    def adapters(self) -> tuple[str, ...]:
        """One LoRA for the canvas."""
        return ("pair",)

    @property
    def default_noise(self) -> NoiseMode:
        """In training the two halves of the canvas carry unrelated noise."""
        return "independent"

    @property
    def branches(self) -> tuple[str, ...]:
        """The canvas is the one latent."""
        return ("pair",)

    def views(self, pair: View) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The canvas and where it is valid; a squeezed pixel is valid if both of its columns are."""
        images, masks = [pair.cf, pair.fa.expand(3, -1, -1)], [pair.valid_cf, pair.valid_fa]
        if self.squeezed:
            images = [squeeze(image) for image in images]
            masks = [mask[..., 0::2] & mask[..., 1::2] for mask in masks]
        return {"pair": (torch.cat(images, dim=-1), torch.cat(masks, dim=-1))}

    def prompts(self, cf_prompt: str, fa_prompt: str) -> dict[str, str]:
        """One prompt made of both; raises ``InvalidSpec`` if the base cannot take it whole."""
        joined = f"{cf_prompt}, beside {fa_prompt}"
        try:
            self.base.encode_prompts([joined])
        except InvalidSpec as error:
            message = f"side_by_side has ONE prompt for both images; shorten cf_prompt or fa_prompt: {error}"
            raise InvalidSpec(message, problems=(Problem("/cf_prompt", "prompt_too_long", message),)) from error
        return {"pair": joined}

    def by_modality(self, branches: Mapping[str, ModalityLatents]) -> Mapping[str, ModalityLatents]:
        """The halves of the canvas."""
        canvas = branches["pair"]
        cut = {f.name: halves(getattr(canvas, f.name)) for f in fields(canvas) if f.name != "timesteps"}
        return {m: replace(canvas, **{name: half[i] for name, half in cut.items()}) for i, m in enumerate(("cf", "fa"))}

    def moments_by_modality(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        """The halves of the canvas."""
        canvas = moments["pair"]
        cut = zip(halves(canvas.mean), halves(canvas.logvar), halves(canvas.valid), strict=True)
        return {m: Moments(*half) for m, half in zip(("cf", "fa"), cut, strict=True)}

    def noise_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one HALF of the canvas.

        Raises ``InvalidSpec`` if a half's width is no whole number of latent cells: the cut would go through one.
        """
        channels, height, width = self.base.latent_shape(resolution)
        if not self.squeezed:
            return (channels, height, width)
        if width % 2:
            message = (
                f"resolution {resolution} is not divisible by {2 * self.base.latent_stride}, as side_by_side needs "
                "with squeezed images; take another resolution, or train with side_by_side.squeeze = false"
            )
            raise InvalidSpec(message, problems=(Problem("/resolution", "not_divisible", message),))
        return (channels, height, width // 2)

    def join(self, noise: torch.Tensor) -> torch.Tensor:
        """``(2 B, C, h, w)``, all CF halves first, as B canvases ``(B, C, h, 2 w)``."""
        return torch.cat(noise.chunk(2), dim=-1)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, place: int, count: int) -> dict[str, torch.Tensor]:
        """Decode canvas ``place``, cut it and stretch its halves back; see :meth:`PairMethod.decode`."""
        cut = halves(self.base.decode(latents[place].unsqueeze(0))[0])
        return {m: stretch(half) if self.squeezed else half for m, half in zip(("cf", "fa"), cut, strict=True)}
