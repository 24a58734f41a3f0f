"""The U-Net's loss in pretraining, and the stages that train it on whole images at one size."""

from __future__ import annotations

import torch

from cffa_core.data.phantom import CF_PROMPT, FA_PROMPT
from cffa_core.models.tiny import TinyParts
from cffa_core.rng import generator

from .pretrain_config import PretrainRun
from .pretrain_data import Phantoms
from .pretrain_loop import Budget, train_stage


def train_unet(
    run: PretrainRun, stage: str, parts: TinyParts, latents: torch.Tensor, phantoms: Phantoms, budget: Budget
) -> dict[str, float]:
    """Train U-Net and text encoder on ``latents`` with :func:`epsilon_error`.

    One prompt in ten is empty, three in ten are the modality's fixed prompt without findings.
    """
    unet, text = parts.unet.to(run.device, memory_format=torch.channels_last), parts.text_encoder.to(run.device)
    full = tokens(parts, [phantoms.caption(index) for index in range(len(latents))])
    plain = tokens(parts, [(CF_PROMPT, FA_PROMPT)[index % 2] for index in range(len(latents))])
    empty = tokens(parts, [""])

    def loss(step: int, shard: int) -> torch.Tensor:
        draws = generator(run.seed, stage, step, shard)
        rows = torch.randint(len(latents), (budget.per_shard,), generator=draws)
        kind = torch.rand(budget.per_shard, 1, generator=draws)
        prompt = torch.where(kind < 0.1, empty, torch.where(kind < 0.4, plain[rows], full[rows]))
        return epsilon_error(run, parts, latents[rows], prompt, draws).mean()

    facts = train_stage(
        stage,
        run.work,
        {"unet": unet, "text_encoder": text},
        loss,
        budget,
        resume=run.resume,
        every=run.config.every,
        ema=0.997,
        progress=run.progress,
    )
    unet.eval()
    text.eval()
    return facts


def epsilon_error(
    run: PretrainRun, parts: TinyParts, x0: torch.Tensor, prompt: torch.Tensor, draws: torch.Generator
) -> torch.Tensor:
    """Weighted squared error of epsilon of latents ``x0`` (B, 4, h, w) under token ids ``prompt`` (B, 77); (B,)."""
    noisy, noise, t, weight = noised(parts, x0, draws)
    with run.autocast():
        context = parts.text_encoder(prompt.to(run.device)).last_hidden_state
        channels_last = noisy.to(run.device).contiguous(memory_format=torch.channels_last)
        predicted = parts.unet(channels_last, t.to(run.device), encoder_hidden_states=context).sample
    error = (predicted.float() - noise.to(run.device)).square().mean((1, 2, 3))
    return torch.as_tensor(weight.to(run.device) * error)


def noised(
    parts: TinyParts, x0: torch.Tensor, draws: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents ``x0`` (B, 4, h, w) with noise at random timesteps, the noise, the timesteps (B,), their weights (B,).

    Offset noise 0.1. The weight of the error in x0 is SNR clamped to 0.1..5: above as min-SNR-5 (Hang et al. 2023, eq.
    8), below as truncated SNR (Salimans & Ho 2022), since the noisiest steps settle aperture, disc and colour.
    """
    noise = torch.randn(x0.shape, generator=draws)
    noise += 0.1 * torch.randn(*x0.shape[:2], 1, 1, generator=draws)
    t = torch.randint(1000, (len(x0),), generator=draws)
    a = parts.scheduler.alphas_cumprod[t][:, None, None, None]
    snr = (a / (1 - a)).flatten()
    return a.sqrt() * x0 + (1 - a).sqrt() * noise, noise, t, snr.clamp(0.1, 5) / snr


def tokens(parts: TinyParts, prompts: list[str]) -> torch.Tensor:
    """Token ids (B, 77), padded with the end token."""
    batch = parts.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    return torch.as_tensor(batch.input_ids)
