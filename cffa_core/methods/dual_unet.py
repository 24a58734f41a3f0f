"""`dual_unet`, the main pair method (METHODS 2): one frozen UNet, a LoRA per modality, decoupled training.

CF and FA rows go through one forward of the base, each with its own low-rank update; only the losses, and in sampling
the initial noise, tie them. Everything else is common to all methods (`method`).
"""

from __future__ import annotations

from cffa_core.jobs.spec import Method, NoiseMode
from cffa_core.methods.method import PairMethod


class DualUnet(PairMethod):
    """A base with a LoRA per modality."""

    method = Method.DUAL_UNET

    @property
    def default_noise(self) -> NoiseMode:
        """Banded, where the training pairs gave rotations: it aligns best by far (docs/adr/0009)."""
        return "shared" if self.band_rotations is None else "banded"
