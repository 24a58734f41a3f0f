"""The denoiser of the image latents: a UNet at 7 x 7 throughout, steered by FiLM alone (Perez et al. 2018; METHODS 7).

Every residual block scales and shifts its normalised maps, ``h * (1 + scale) + shift``, by what time and text say
together. The blocks are diffusers' (``time_embedding_norm="scale_shift"``). Knows no schedule.
"""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from cffa_core.captioned.image_coder import GROUPS
from cffa_core.jobs.captioned_spec import CaptionedSizes

HEADS = 4


class FilmUnet(nn.Module):
    """Widths c0 -> c1 -> c2 and back with skips, no downsampling; in the middle Res - Attention (4 heads) - Res."""

    def __init__(self, sizes: CaptionedSizes) -> None:
        super().__init__()
        first, second, third = sizes.unet
        self.condition = sizes.embedding
        self.time = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, self.condition)
        self.text_embedding = nn.Linear(sizes.embedding, self.condition)
        self.no_text = nn.Parameter(torch.zeros(sizes.embedding))
        self.enter = nn.Conv2d(sizes.latent_channels, first, 3, padding=1)
        self.down = nn.ModuleList([self._block(first, first), self._block(first, second), self._block(second, third)])
        self.middle_before = self._block(third, third)
        self.attention = Attention(
            third, heads=HEADS, dim_head=third // HEADS, bias=True, norm_num_groups=GROUPS, residual_connection=True
        )
        self.middle_after = self._block(third, third)
        self.up = nn.ModuleList(
            [self._block(2 * third, third), self._block(third + second, second), self._block(second + first, first)]
        )
        self.norm = nn.GroupNorm(GROUPS, first)
        self.leave = nn.Conv2d(first, sizes.latent_channels, 3, padding=1)
        for parameter in self.leave.parameters():  # at first every clean latent is taken for the mean one
            nn.init.zeros_(parameter)

    def _block(self, channels: int, width: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=channels,
            out_channels=width,
            temb_channels=self.condition,
            groups=GROUPS,
            time_embedding_norm="scale_shift",
        )

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """Clean latents ``(B, C, 7, 7)`` as seen from noisy ones at ``timesteps (B,)`` with text ``(B, E)``."""
        time = self.time_embedding(self.time(timesteps).to(self.no_text.dtype))
        condition = time + self.text_embedding(text)
        x = self.enter(noisy)
        skips = []
        for block in self.down:
            x = block(x, condition)
            skips.append(x)
        x = self.middle_after(self.attention(self.middle_before(x, condition)), condition)
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1), condition)
        return torch.as_tensor(self.leave(nn.functional.silu(self.norm(x))))
