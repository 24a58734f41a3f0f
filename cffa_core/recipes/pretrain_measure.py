"""What the pretrained base is worth: round trip of the VAE, validation loss of the U-Net, and the model card.

Ridge Dice here is the card's own small measure; the scores of generated pairs are ``cffa_core.evaluation``.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from skimage.filters import sato

from cffa_core.models.tiny import TinyParts, export_tiny, parameter_count
from cffa_core.rng import cpu_model, generator

if TYPE_CHECKING:
    from .pretrain_config import PretrainConfig

Image = npt.NDArray[np.uint8]
STAGES = (
    "vae", "vae-refine", "vae-decoder", "unet-small", "unet-large", "text-words", "unet-words",
)  # fmt: skip


def ridges(image: Image, *, dark: bool, keep: float = 0.12) -> npt.NDArray[np.bool_]:
    """The strongest ``keep`` of Sato ridges (sigma 1-3 px) inside the eroded non-black area of (H, W) ``image``."""
    response = sato(image.astype(np.float32) / 255, sigmas=(1, 2, 3), black_ridges=dark)
    area = ground(image)
    if not area.any():
        return np.zeros(image.shape, np.bool_)
    return np.asarray((response >= np.quantile(response[area], 1 - keep)) & area, np.bool_)


def ground(image: Image) -> npt.NDArray[np.bool_]:
    """Non-black area, eroded by 9 px so that the aperture's rim is no ridge."""
    import cv2

    kernel = np.ones((19, 19), np.uint8)
    seen = cv2.morphologyEx((image > 8).astype(np.uint8), cv2.MORPH_CLOSE, kernel)
    return np.asarray(cv2.erode(seen, kernel, borderValue=0) > 0, np.bool_)


def dice(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """Dice coefficient of two masks; 0 where both are empty."""
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


@torch.no_grad()
def round_trip(vae: AutoencoderKL, image: Image, device: torch.device) -> Image:
    """Encode (posterior mean) and decode one (H, W, 3) uint8 image in fp32."""
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(device).float() / 127.5 - 1
    y = vae.decode(vae.encode(x).latent_dist.mean).sample[0].clamp(-1, 1)
    return np.asarray(((y + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def measure_round_trip(
    vae: AutoencoderKL, cf: npt.NDArray[np.uint8], fa: npt.NDArray[np.uint8], device: torch.device, most: int = 16
) -> dict[str, float]:
    """Mean PSNR (dB) and ridge Dice, before against after, of CF (green, dark ridges) and FA (bright ridges)."""
    found: dict[str, list[float]] = {"psnr cf": [], "psnr fa": [], "dice cf": [], "dice fa": []}
    for colour, grey in zip(cf[:most], fa[:most], strict=True):
        back = round_trip(vae, colour, device)
        found["psnr cf"].append(_psnr(colour, back))
        found["dice cf"].append(dice(ridges(colour[..., 1], dark=True), ridges(back[..., 1], dark=True)))
        again = round_trip(vae, np.repeat(grey[..., None], 3, 2), device).mean(2).round().astype(np.uint8)
        found["psnr fa"].append(_psnr(grey, again))
        found["dice fa"].append(dice(ridges(grey, dark=False), ridges(again, dark=False)))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _psnr(a: Image, b: Image) -> float:
    error = float(np.mean((a.astype(np.float64) - b) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-6)))


@torch.no_grad()
def validate_unet(
    parts: TinyParts, latents: torch.Tensor, captions: list[dict[str, str]], device: torch.device
) -> dict[str, float]:
    """Mean squared error of eps on held-out ``latents`` at t = 200, 500, 800 with fixed draws (METHODS 2)."""
    parts.unet.to(device)
    parts.text_encoder.to(device)
    prompts = [captions[index // 2]["fa" if index % 2 else "cf"] for index in range(len(latents))]
    batch = parts.tokenizer(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    result = {}
    for t in (200, 500, 800):
        noise = torch.randn(latents.shape, generator=generator("tiny", "validation", t))
        a = parts.scheduler.alphas_cumprod[t]
        noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
        errors = []
        for start in range(0, len(latents), 8):
            rows = slice(start, start + 8)
            context = parts.text_encoder(torch.as_tensor(batch.input_ids[rows]).to(device)).last_hidden_state
            guess = parts.unet(noisy[rows].to(device), t, encoder_hidden_states=context).sample.cpu()
            errors.append((guess - noise[rows]).square().mean((1, 2, 3)))
        result[f"val {t}"] = float(torch.cat(errors).mean())
    return result


def machine_name() -> str:
    """What a card says it was made on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} cores of an {cpu_model()}"


def write_card(
    out: Path, parts: TinyParts, facts: Mapping[str, Mapping[str, float]], *, seed: int, config: PretrainConfig
) -> None:
    """Export ``parts`` to ``out`` with a model card that states how they were made and measured."""
    counts = {name: parameter_count(getattr(parts, name)) / 1e6 for name in ("unet", "vae", "text_encoder")}
    trip = facts["round trip"]
    stages = [
        f"| {name} | {facts[name]['steps']:.0f} | {facts[name]['seconds'] / 60:.1f} | {facts[name]['loss']:.4f} |"
        for name in STAGES
        if name in facts
    ]
    validation = [
        f"| {label} | " + " | ".join(f"{facts[name][f'val {t}']:.4f}" for t in (200, 500, 800)) + " |"
        for name, label in (
            ("unet-small", f"after {config.resolution // 2} px"),
            ("unet-large", f"after {config.resolution} px"),
            ("unet-words", "after words"),
        )
        if name in facts
    ]
    taught = "words" in facts
    ratios = "".join(f"| {name} | {ratio:.2f} |\n" for name, ratio in facts.get("words", {}).items())
    text = CARD.format(
        seed=seed,
        phantoms=config.phantoms,
        machine=machine_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        resolution=config.resolution,
        half=config.resolution // 2,
        stages="\n".join(stages),
        validation="\n".join(validation),
        how_words=HOW_WORDS if taught else "",
        words=WORDS.format(ratios=ratios) if taught else "",
        said=FOLLOWED if taught else NOT_FOLLOWED,
        **{name: f"{value:.2f}" for name, value in counts.items()},
        **{
            name.replace(" ", "_"): f"{value:.3f}" if "dice" in name else f"{value:.1f}" for name, value in trip.items()
        },
    )
    export_tiny(out, parts, text)


CARD = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# tiny

A very small latent diffusion model of colour fundus photographs and fluorescein angiograms in the Stable Diffusion
folder layout: U-Net {unet} M parameters, VAE {vae} M, text encoder {text_encoder} M, stored in fp16. It is the embedded
default base of CFFA: for the demo, the tests and for learning the code on a laptop.

**It has never seen an eye.** It was trained on procedural phantoms alone (`cffa_core.data.phantom`), so what it makes
looks like a retina but says nothing about real ones. Not for diagnosis, not for statistics about disease.

## How it was made

`cffa_core.recipes.pretrain.build_tiny`, seed {seed}, {phantoms} phantom pairs, on {machine} (Python {python},
torch {torch}). Stages with wall-clock caps; loss is the smoothed training loss.

| stage | steps | minutes | loss |
|---|---|---|---|
{stages}

VAE: L1 + Sobel L1 + L1 of 8x8 means on crops with colour jitter, with the posterior's deviation fixed at 0.06, twice
(the second time with its latents standardised), at last the decoder alone; its 1x1 convolutions are folded so that each
latent channel has mean 0 and deviation 1 (scaling_factor 1).

U-Net: epsilon, error in x0 weighted with SNR clamped to 0.1..5, offset noise 0.1, EMA 0.997, 10 % empty prompts; at
{half} px, then at {resolution} px. The noise schedule ends at beta 0.02 (docs/tiny-base.md says why).{how_words}

## Measured on held-out phantoms

VAE round trip at {resolution} px: PSNR {psnr_cf} dB (CF), {psnr_fa} dB (FA); Dice of the strongest 12 % Sato ridges
before against after {dice_cf} (CF green), {dice_fa} (FA).

Mean squared error of the U-Net's epsilon with fixed draws:

| | t = 200 | t = 500 | t = 800 |
|---|---|---|---|
{validation}
{words}
## Use

512x512, 30-50 DDIM steps, guidance 1 to 3. Prompts it knows: "A high quality color fundus photograph, retinal
structure" and "A high quality fluorescein angiography image, bright retinal vessels"{said} Any other text tokenises but
means little to it.

## Limits

Fine capillaries do not survive the VAE; vessels may end in nothing or join where they should not; it knows no cameras
but the phantoms'.
"""

HOW_WORDS = """
Then its words: the text encoder alone learns to tell what a prompt names, then the U-Net what that looks like, on the
lesions' cells; all else is taught by the model as it was before (`cffa_core.recipes.pretrain_words`)."""

WORDS = """
The same error on cells of a finding, without the finding's word over with it (1: the word means nothing):

| | ratio |
|---|---|
{ratios}"""

FOLLOWED = """, each optionally followed by ", with
haemorrhages, exudates, microaneurysms", ", with leakage, late phase" and the like, and findings as words alone."""

NOT_FOLLOWED = """. Words of
findings behind them (", with haemorrhages") hardly change what it draws."""
