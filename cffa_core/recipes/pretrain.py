"""Trains the ``tiny`` base from nothing but phantoms: cache, VAE, latents, U-Net, words, export.

One resumable script: every stage ends in files under ``work`` and is skipped when they exist; inside a stage the last
checkpoint continues. Without wall-clock caps a resumed run ends in the same weights, bit for bit, as one that was never
stopped (same machine, same threads). Checkpoints are safetensors and JSON. Not here: the parts (models.tiny).
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from cffa_core.errors import CorruptArtifact
from cffa_core.models.tiny import TinyParts, build_parts, fold_latent_statistics
from cffa_core.rng import derive_seed, generator

from .pretrain_config import PretrainConfig, PretrainRun
from .pretrain_data import Phantoms, cache_phantoms, crops, jitter
from .pretrain_loop import Budget, Progress, train_stage, write_tensors
from .pretrain_measure import measure_round_trip, validate_unet, write_card
from .pretrain_unet import train_unet
from .pretrain_words import cache_lesions, frozen, measure_words, teach_text, train_words

LATENT_SIGMA = 0.06  # deviation of the posterior, in units of the latents' deviation
SAME_LATENTS = 0.05  # mean deviation; bf16 on another machine makes 0.005, a VAE of another run 0.16 and more
LATENT_PULL = 1e-3  # weight of the latents' square beside the reconstruction error


def build_tiny(
    out: Path,
    *,
    seed: int,
    work: Path,
    config: PretrainConfig | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> TinyParts:
    """Train the ``tiny`` base into the folder ``out``, keeping caches and checkpoints under ``work``.

    ``on_progress(stage, done, total, loss)`` is called after each step. With ``resume`` finished stages are read back
    and a half-done one goes on from its last checkpoint.
    """
    config = config or PretrainConfig()
    progress = on_progress or (lambda *_: None)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = PretrainRun(seed, work, config, resume, device, progress)
    parts = build_parts(config.sizes, derive_seed(seed, "tiny", "weights") % 2**32, work / "tokenizer")
    train = cache_phantoms(work, "train", config.phantoms, config.resolution, seed, progress)
    heldout = cache_phantoms(work, "heldout", config.heldout, config.resolution, seed, progress)
    facts = {"vae": train_vae(run, "vae", parts.vae, train, config.vae)}
    standardise(run, parts.vae, train)
    facts["vae-refine"] = train_vae(run, "vae-refine", parts.vae, train, config.refine)
    standardise(run, parts.vae, train)
    facts["vae-decoder"] = train_decoder(run, parts.vae, train)
    facts["round trip"] = measure_round_trip(parts.vae, heldout.cf, heldout.fa, device)
    for stage, budget, pairs, shrink in (
        ("unet-small", config.small, config.phantoms, 2),
        ("unet-large", config.large, config.large_pairs, 1),
    ):
        latents = encode(run, parts.vae, train, pairs, shrink, "train")
        unseen = encode(run, parts.vae, heldout, config.heldout, shrink, "heldout")
        facts[stage] = train_unet(run, stage, parts, latents, train, budget)
        facts[stage].update(validate_unet(parts, unseen, heldout.captions, device))
    if config.teach_words:
        facts |= taught(run, parts, latents, unseen, heldout.captions)
    write_card(out, parts, facts, seed=seed, config=config)
    return parts


def taught(
    run: PretrainRun, parts: TinyParts, latents: torch.Tensor, unseen: torch.Tensor, captions: list[dict[str, str]]
) -> dict[str, dict[str, float]]:
    """Teach ``parts`` their words (``pretrain_words``) on ``latents`` of the first pairs of the cache.

    Returns what was measured by stage, on the held-out latents ``unseen`` with their ``captions``.
    """
    config = run.config
    before = replace(parts, unet=frozen(parts.unet, run.device), text_encoder=frozen(parts.text_encoder, run.device))
    facts = {"text-words": teach_text(run, parts, config.text)}
    lesions, unseen_lesions = (
        cache_lesions(run.work, split, pairs, config.resolution, run.seed, run.progress)
        for split, pairs in (("train", config.large_pairs), ("heldout", config.heldout))
    )
    facts["unet-words"] = train_words(run, parts, latents, lesions, before, config.words)
    facts["unet-words"].update(validate_unet(parts, unseen, captions, run.device))
    facts["words"] = measure_words(parts, unseen, unseen_lesions, run.device)
    return facts


def train_vae(run: PretrainRun, stage: str, vae: AutoencoderKL, phantoms: Phantoms, budget: Budget) -> dict[str, float]:
    """Train the VAE on crops for one stage.

    Loss: :func:`reconstruction_error` + a pull of the latents towards 0, with the posterior's deviation fixed at
    ``LATENT_SIGMA``: a KL term emptied two of the four channels. A linear head must read the 8x8 means off the latents,
    so that colour stays in them.
    """
    vae.to(run.device, memory_format=torch.channels_last)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, stage, "head") % 2**32)
        head = torch.nn.Conv2d(4, 3, 1).to(run.device)

    def loss(step: int, shard: int) -> torch.Tensor:
        rng = np.random.default_rng(derive_seed(run.seed, stage, step, shard))
        draws = generator(run.seed, stage, step, shard)
        images = jitter(crops(phantoms, rng, budget.per_shard, run.config.crop), draws).to(run.device)
        images = images.contiguous(memory_format=torch.channels_last)
        with run.autocast():
            mean = vae.encode(images).latent_dist.mean.float()
        noise = torch.randn(mean.shape, generator=draws).to(run.device)
        latents = mean + LATENT_SIGMA * noise
        with run.autocast():
            decoded = vae.decode(latents).sample
        decoded = decoded.float()
        error = reconstruction_error(decoded, images) + F.l1_loss(head(latents), F.avg_pool2d(images, 8))
        return torch.as_tensor(error + LATENT_PULL * mean.square().mean())

    return train_stage(
        stage, run.work, {"vae": vae, "head": head}, loss, budget, resume=run.resume, every=run.config.every, ema=0.998,
        progress=run.progress,
    )  # fmt: skip


def train_decoder(run: PretrainRun, vae: AutoencoderKL, phantoms: Phantoms) -> dict[str, float]:
    """Train the decoder alone on twice larger crops, with the encoder, and so the latents, as they are.

    GroupNorm sees the whole crop: on small ones the decoder learns another brightness than it needs on whole images.
    """
    vae.to(run.device, memory_format=torch.channels_last).eval()
    budget, stage = run.config.decoder, "vae-decoder"

    def loss(step: int, shard: int) -> torch.Tensor:
        rng = np.random.default_rng(derive_seed(run.seed, stage, step, shard))
        draws = generator(run.seed, stage, step, shard)
        size = min(2 * run.config.crop, run.config.resolution)
        images = jitter(crops(phantoms, rng, budget.per_shard, size), draws).to(run.device)
        images = images.contiguous(memory_format=torch.channels_last)
        with run.autocast(), torch.no_grad():
            mean = vae.encode(images).latent_dist.mean.float()
        latents = mean + LATENT_SIGMA * torch.randn(mean.shape, generator=draws).to(run.device)
        with run.autocast():
            decoded = vae.decode(latents).sample
        return reconstruction_error(decoded.float(), images)

    modules = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    return train_stage(
        stage, run.work, modules, loss, budget, resume=run.resume, every=run.config.every, ema=0.995,
        progress=run.progress,
    )  # fmt: skip


def reconstruction_error(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 + L1 of Sobel gradients (vessels are a small part of the area) + L1 of 8x8 means (the hue)."""
    error = F.l1_loss(decoded, images) + F.l1_loss(sobel(decoded), sobel(images))
    return error + F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))


def standardise(run: PretrainRun, vae: AutoencoderKL, phantoms: Phantoms) -> None:
    """Fold the latents' statistics over 128 images into the VAE: mean 0, deviation 1, posterior LATENT_SIGMA."""
    vae.eval()
    some = np.linspace(0, 2 * len(phantoms.cf) - 1, min(128, 2 * len(phantoms.cf))).astype(int)
    latents = torch.cat([vae_mean(run, vae, [phantoms.image(int(i))]) for i in some])
    fold_latent_statistics(vae, latents.mean((0, 2, 3)).to(run.device), latents.std((0, 2, 3)).to(run.device))
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = 2 * math.log(LATENT_SIGMA)


def sobel(images: torch.Tensor) -> torch.Tensor:
    """Sobel gradients of each channel, (B, 2C, H-2, W-2), scaled to differences per pixel."""
    kernel = images.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    channels = images.shape[1]
    weight = torch.stack([kernel, kernel.T]).unsqueeze(1).repeat(channels, 1, 1, 1)
    return F.conv2d(images, weight, groups=channels)


@torch.no_grad()
def vae_mean(run: PretrainRun, vae: AutoencoderKL, images: list[npt.NDArray[np.uint8]]) -> torch.Tensor:
    """Posterior means of (H, W, 3) uint8 images, (B, 4, H/8, W/8) on the CPU."""
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(run.device).float() / 127.5 - 1
    with run.autocast():
        mean = vae.encode(batch.contiguous(memory_format=torch.channels_last)).latent_dist.mean
    return torch.as_tensor(mean.float().cpu())


def encode(
    run: PretrainRun, vae: AutoencoderKL, phantoms: Phantoms, pairs: int, shrink: int, split: str
) -> torch.Tensor:
    """Latents of the first ``pairs`` pairs at 1/``shrink`` size, (2 pairs, 4, h, w), kept in ``work``.

    Raises :class:`CorruptArtifact` for kept ones whose first is not what this VAE makes of the first image: a U-Net
    that trains on latents of another VAE learns without complaint, and draws worse than before.
    """
    path = run.work / f"latents-{split}-{shrink}-{pairs}.safetensors"
    size = phantoms.cf.shape[1] // shrink

    def image(index: int) -> npt.NDArray[np.uint8]:
        whole = phantoms.image(index)
        return whole if shrink == 1 else np.asarray(cv2.resize(whole, (size, size), interpolation=cv2.INTER_AREA))

    def some(start: int) -> torch.Tensor:
        images = [image(index) for index in range(start, min(start + 8, 2 * pairs))]
        run.progress(f"latents-{split}-{shrink}", start + len(images), 2 * pairs, 0.0)
        return vae_mean(run, vae, images)

    if not (run.resume and path.exists()):
        with ThreadPoolExecutor(run.config.small.shards) as pool:
            out = list(pool.map(some, range(0, 2 * pairs, 8)))
        write_tensors(path, {"latents": torch.cat(out)})
    latents: torch.Tensor = load_file(path)["latents"]
    off = float((vae_mean(run, vae, [image(0)]) - latents[:1]).abs().mean())
    if off > SAME_LATENTS:
        raise CorruptArtifact(
            f"{path} holds latents of another VAE or of other images (off by {off:.2f} deviations): remove it, and it "
            "is made anew"
        )
    return latents
