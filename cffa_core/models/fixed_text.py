"""Keys and values of the prompts, computed once for all steps of a sampling run instead of at every step.

While a batch is denoised its prompts do not change, so neither does what the cross-attentions project them to. The
result is the same to the last bit. Knows a UNet of diffusers, and no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class FixedProjection(nn.Module):
    """Stands for a projection and answers every call of a run with what the first one gave."""

    def __init__(self) -> None:
        super().__init__()
        self.known: torch.Tensor | None = None
        # In a tuple, so that it is no submodule: a projection must not appear twice among a UNet's weights.
        self._projection: tuple[nn.Module, ...] = ()

    def stand_for(self, projection: nn.Module) -> None:
        """Begin a run."""
        self.known, self._projection = None, (projection,)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """Project ``(R, 77, D)`` to ``(R, 77, C)``, at the first call."""
        if self.known is None:
            self.known = self._projection[0](text)
        return self.known


class FixedText:
    """The projections of the text (``attn2.to_k``, ``attn2.to_v``) of one UNet."""

    def __init__(self, unet: Any) -> None:
        # The stand-ins live as long as this object: a compiled UNet would be compiled anew for others.
        self._places = [
            (module, side, FixedProjection())
            for name, module in unet.named_modules()
            if name.endswith(".attn2")
            for side in ("to_k", "to_v")
        ]

    @contextmanager
    def during_a_run(self) -> Iterator[None]:
        """Inside, every forward of the UNet must have the same text and the same rows; then all is as before."""
        own = [getattr(attention, side) for attention, side, _ in self._places]
        try:
            for (attention, side, fixed), projection in zip(self._places, own, strict=True):
                fixed.stand_for(projection)
                setattr(attention, side, fixed)
            yield
        finally:
            for (attention, side, fixed), projection in zip(self._places, own, strict=True):
                setattr(attention, side, projection)
                fixed.known = None
