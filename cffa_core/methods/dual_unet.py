"""`dual_unet`, the main pair method (METHODS 2): one frozen UNet, a LoRA per modality, decoupled training.

CF and FA rows go through one forward of the base, each with its own low-rank update; only the losses, and in sampling
the initial noise, tie them. With placeholder tokens (METHODS 6) the steps are those of `masked_attention`. Everything
else is common to all methods (`method`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from cffa_core.data.pairs import Pair
from cffa_core.jobs.spec import Method, NoiseMode
from cffa_core.methods.masked_attention import Loss, MaskedAttention
from cffa_core.methods.method import PairMethod, Tensors
from cffa_core.methods.placeholder_tokens import PlaceholderTokens


class DualUnet(PairMethod):
    """A base with a LoRA per modality, and with placeholder tokens where the settings name any."""

    method = Method.DUAL_UNET
    tokens: PlaceholderTokens | None = None
    masked: MaskedAttention | None = None

    def set_up(self) -> None:
        """Teach tokenizer and text encoder the tokens."""
        if self.settings.tokens is not None:
            self.tokens = PlaceholderTokens(self.base, self.settings.tokens)
            self.base = self.tokens.base
            self.masked = MaskedAttention(self, self.tokens)

    @property
    def default_noise(self) -> NoiseMode:
        """Banded, where the training pairs gave rotations: it aligns best by far (docs/adr/0009)."""
        return "shared" if self.band_rotations is None else "banded"

    # --- placeholder tokens -------------------------------------------------------------------------------------------

    def with_tokens(self, prompts: Mapping[str, str], tokens: Sequence[str] | None) -> dict[str, str]:
        """See :meth:`PlaceholderTokens.prompts`."""
        if self.tokens is None:
            return super().with_tokens(prompts, tokens)
        return self.tokens.prompts(prompts, tokens)

    def structure(self, pair: Pair) -> dict[str, torch.Tensor]:
        """Where the tokens are in a pair (:meth:`MaskedAttention.structure`); nothing without tokens."""
        return {} if self.masked is None else self.masked.structure(pair)

    def training_parts(
        self,
        x0: Tensors,
        valid: Tensors,
        text: Tensors,
        generator: torch.Generator,
        structure: Tensors | None = None,
    ) -> Iterator[Loss]:
        """With tokens, the steps of :meth:`MaskedAttention.parts`, which have prompts of their own."""
        if self.masked is None or structure is None:
            return super().training_parts(x0, valid, text, generator, structure)
        return self.masked.parts(x0, valid, structure, generator)

    def loss_at(
        self,
        x0: Tensors,
        valid: Tensors,
        text: Tensors,
        timesteps: Tensors,
        noise: Tensors,
        structure: Tensors | None = None,
    ) -> Loss:
        """With tokens, that of :meth:`MaskedAttention.loss_at`."""
        if self.masked is None or structure is None:
            return super().loss_at(x0, valid, text, timesteps, noise, structure)
        return self.masked.loss_at(x0, valid, structure, timesteps, noise)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The LoRAs, then the tokens and the text encoder's weights (:meth:`PlaceholderTokens.named_parameters`)."""
        yield from super().named_parameters()
        if self.tokens is not None:
            yield from self.tokens.named_parameters()

    @property
    def prior(self) -> dict[str, torch.Tensor] | None:
        """Latents of the base's own pictures by branch, empty until they are drawn; None where none are wanted."""
        wanted = self.masked is not None and self.masked.spec.prior_weight > 0
        return self.masked.prior if self.masked is not None and wanted else None

    # --- the model folder ---------------------------------------------------------------------------------------------

    @property
    def _has_text(self) -> bool:
        """Whether the text encoder has moved: it has not in phase 1, and is then the base's."""
        spec = self.settings.tokens
        return spec is not None and spec.train_text_encoder and self.step > spec.phase1_steps

    def parameter_counts(self) -> dict[str, int]:
        """Trained parameters of the LoRAs, of the tokens and of the text encoder."""
        counts = super().parameter_counts()
        if self.tokens is not None:
            counts["tokens"] = self.tokens.embedding.rows.numel()
            counts["text_encoder"] = sum(weight.numel() for weight in self.tokens.text.values())
        return counts

    def write_weights(self, folder: Path) -> None:
        """Write the LoRAs and, with tokens, what :meth:`PlaceholderTokens.write` writes."""
        super().write_weights(folder)
        if self.tokens is not None:
            self.tokens.write(folder, with_text=self._has_text)

    def read_weights(self, folder: Path) -> None:
        """Read what :meth:`write_weights` wrote; raises ``CorruptArtifact`` or ``ModelUnavailable``."""
        super().read_weights(folder)
        if self.tokens is not None:
            self.tokens.read(folder, with_text=self._has_text)
