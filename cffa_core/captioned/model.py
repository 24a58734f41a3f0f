"""The captioned model: its parts together, the joint loss of a training step, drawing and describing (METHODS 7).

Knows no files (`model_folder`), data sets or jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import nn
from torch.func import functional_call

from cffa_core.captioned.film_unet import FilmUnet
from cffa_core.captioned.image_coder import LATENT_SIDE, ImageDecoder, ImageEncoder, LatentScale
from cffa_core.captioned.losses import contrastive, pull, reconstruction, same_text
from cffa_core.captioned.text_coder import CaptionDecoder, CaptionSampling, TextEncoder
from cffa_core.captioned.vocabulary import Tokens, Vocabulary
from cffa_core.jobs.captioned_spec import CaptionedSizes, CaptionedTrainSettings

STEPS = 1000
# Of the contrastive loss: 14, as CLIP begins.
LOG_TEMPERATURE = 2.66


def build_scheduler() -> Any:
    """DDIM (Song et al. 2021) on linear betas 1e-4..0.02, T = 1000, from t = 999 whatever the number of steps.

    The model predicts the clean latent, not the noise: a latent is a linear image of 512 numbers, so noise in its
    12,544 is mostly outside of what a 128 channels wide UNet can carry, and the clean latent is not.
    """
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


@dataclass(frozen=True)
class Draws:
    """What is random in a training step: ``timesteps`` (B,), ``noise`` (B, C, 7, 7), ``without_text`` (B,) bool."""

    timesteps: torch.Tensor
    noise: torch.Tensor
    without_text: torch.Tensor

    @classmethod
    def of(cls, rows: int, sizes: CaptionedSizes, dropout: float, generator: torch.Generator) -> Draws:
        """Draw for ``rows`` pictures, on the CPU."""
        timesteps = torch.randint(STEPS, (rows,), generator=generator)
        noise = torch.randn(rows, sizes.latent_channels, LATENT_SIDE, LATENT_SIDE, generator=generator)
        return cls(timesteps, noise, torch.rand(rows, generator=generator) < dropout)


class CaptionedModel(nn.Module):
    """Text encoder, picture encoder and decoder, FiLM UNet over the decoder's latents, caption decoder."""

    def __init__(self, sizes: CaptionedSizes, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.sizes = sizes
        self.vocabulary = vocabulary
        self.text_encoder = TextEncoder(sizes, vocabulary)
        self.image_encoder = ImageEncoder(sizes)
        self.image_decoder = ImageDecoder(sizes)
        self.scale = LatentScale(sizes.latent_channels)
        self.unet = FilmUnet(sizes)
        self.caption_decoder = CaptionDecoder(sizes, vocabulary)
        # What a picture shows, among all else that its embedding says: compared with texts.
        self.compared = nn.Linear(sizes.embedding, sizes.embedding)
        # From a text's embedding to the mean of its pictures': decoded where there is no diffusion.
        self.bridge = nn.Linear(sizes.embedding, sizes.embedding)
        self.log_temperature = nn.Parameter(torch.tensor(LOG_TEMPERATURE))
        self.scheduler = build_scheduler()

    @classmethod
    def build(cls, sizes: CaptionedSizes, vocabulary: Vocabulary, seed: int) -> CaptionedModel:
        """An untrained model, initialised from ``seed``; torch's global generator is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(sizes, vocabulary)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of each part."""
        return {name: sum(p.numel() for p in part.parameters()) for name, part in self.named_children()}

    # --- training -----------------------------------------------------------------------------------------------------

    def training_loss(
        self, images: torch.Tensor, tokens: Tokens, draws: Draws, settings: CaptionedTrainSettings
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted loss of a batch ``(B, 3, 224, 224)`` in [-1, 1], and its terms.

        The latent that the diffusion learns is the decoder's projection, without gradient to it; in training mode the
        latents' statistics are renewed first. ``draws`` may be of fewer rows than the batch: the first are then
        reconstructed and diffused, all are compared and captioned.
        """
        text = self.text_encoder(tokens)
        embedding, *maps = self.image_encoder(images)
        count = len(draws.timesteps)
        maps = [level[:count] for level in maps]
        latent = self.image_decoder.latent(embedding[:count])
        drawn = self.image_decoder(latent)
        # A copy also of the running statistics: what is drawn has no part in them.
        frozen = {name: value.detach().clone() for name, value in self.image_encoder.trunk.state_dict().items()}
        drawn_maps = functional_call(self.image_encoder.trunk, frozen, (drawn,))
        target = latent.detach().float()
        if self.training:
            self.scale.update(target)
        terms = {
            "contrastive": contrastive(
                text.float(), self.compared(embedding).float(), same_text(tokens.ids), self.log_temperature
            ),
            "pull": pull(self.bridge(text.detach()).float(), embedding.float()),
            "reconstruction": reconstruction(drawn.float(), images[:count], drawn_maps, maps),
            "caption": self.caption_decoder.loss(embedding, tokens),
            "diffusion": self._diffusion(self.scale.standardise(target), text[:count], draws),
        }
        loss = (
            settings.contrastive_weight * (terms["contrastive"] + terms["pull"])
            + settings.reconstruction_weight * terms["reconstruction"]
            + settings.caption_weight * terms["caption"]
            + settings.diffusion_weight * terms["diffusion"]
        )
        return loss, {name: term.detach() for name, term in terms.items()}

    def _diffusion(self, clean: torch.Tensor, text: torch.Tensor, draws: Draws) -> torch.Tensor:
        """Mean square error of the clean latents that the UNet sees; the gradient goes on into the text encoder."""
        device = clean.device
        timesteps, noise = draws.timesteps.to(device), draws.noise.to(device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        dropped = draws.without_text.to(device)[:, None]
        text = torch.where(dropped, self.unet.no_text.expand_as(text).to(text.dtype), text)
        return F.mse_loss(self.unet(noisy, timesteps, text).float(), clean)

    # --- use ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_text(self, text: str) -> torch.Tensor:
        """Embedding ``(E,)`` of one text; raises ``InvalidSpec`` if the model cannot read it."""
        self.vocabulary.check([text], self.sizes.max_tokens)
        device = self.log_temperature.device
        return torch.as_tensor(self.text_encoder(self.vocabulary.encode([text]).to(device))[0])

    @torch.no_grad()
    def draw(self, text: torch.Tensor, noise: torch.Tensor, steps: int, guidance_scale: float) -> torch.Tensor:
        """Pictures ``(B, 3, 224, 224)`` in [-1, 1] of texts ``(B, E)``: DDIM from ``noise (B, C, 7, 7)``.

        Guidance (Ho & Salimans 2022) beyond 1 moves each prediction on, away from that without text.
        """
        self.scheduler.set_timesteps(steps)
        latent = noise
        without = self.unet.no_text.expand_as(text)
        for t in self.scheduler.timesteps:
            timesteps = t.expand(len(latent)).to(latent.device)
            clean = self.unet(latent, timesteps, text)
            if guidance_scale > 1:
                free = self.unet(latent, timesteps, without)
                clean = free + guidance_scale * (clean - free)
            latent = self.scheduler.step(clean, t, latent).prev_sample
        return torch.as_tensor(self.image_decoder(self.scale.restore(latent))).clamp(-1, 1)

    @torch.no_grad()
    def draw_directly(self, text: torch.Tensor) -> torch.Tensor:
        """Pictures of texts ``(B, E)`` without diffusion: the mean embedding of the text's pictures, decoded."""
        return torch.as_tensor(self.image_decoder(self.image_decoder.latent(self.bridge(text)))).clamp(-1, 1)

    @torch.no_grad()
    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """What is compared with texts, ``(B, E)``, of pictures ``(B, 3, 224, 224)`` in [-1, 1]."""
        return torch.as_tensor(self.compared(self.image_encoder(images)[0]))

    @torch.no_grad()
    def describe(self, image: torch.Tensor, count: int, sampling: CaptionSampling, seed: int) -> list[str]:
        """``count`` captions of one picture ``(3, 224, 224)`` in [-1, 1]."""
        embedding = self.image_encoder(image[None])[0][0]
        return [self.vocabulary.decode(row) for row in self.caption_decoder.draw(embedding, count, sampling, seed)]
