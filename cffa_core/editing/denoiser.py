"""What an edit needs of a model: one forward for rows of CF and FA. A trained pair method gives it, or a base alone.

Here is what the two have in common, and which methods can edit. Knows no edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.methods.method import PairMethod
from cffa_core.models.base import Base

MODALITIES = ("cf", "fa")


class Denoiser(Protocol):
    """A UNet for rows of ``cf`` and ``fa``; every :class:`PairMethod` with these two branches is one."""

    @property
    def base(self) -> Base:
        """Text encoder, VAE and noise schedule."""

    @property
    def unet(self) -> Any:
        """The UNet whose cross-attention says where an edit belongs."""

    def predict_noise(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, rows: Sequence[str]
    ) -> torch.Tensor:
        """``x (R, C, h, w)``, ``text (R, 77, D)``, the modality of each row -> eps_hat float32."""


class BaseAlone:
    """A base without any LoRA: it takes CF and FA apart by their prompts and by what it is shown."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.unet: Any = base.unet

    def predict_noise(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, rows: Sequence[str]
    ) -> torch.Tensor:
        """One forward of the base; ``rows`` make no difference."""
        dtype = self.base.dtype
        predicted: torch.Tensor = self.unet(x.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
        return predicted.float()


def check_can_edit(model: PairMethod) -> None:
    """Raise ``InvalidSpec`` for a model that has no branch for each image, or draws on structures."""
    if tuple(model.branches) == MODALITIES and not model.takes_structure:
        return
    message = (
        f"a model of method {model.method.value} (trained on {', '.join(model.modalities)}) cannot edit pairs; take a "
        "dual_unet or shared_attention model of both images, or the base alone"
    )
    raise InvalidSpec(message, problems=(Problem("/model_id", "cannot_edit", message),))
