"""Base models: load a Stable-Diffusion-layout folder and turn prompts and images into what the UNet works on.

One code path for the shipped `tiny` base, a team's own folder and SD 1.5 from the hub (METHODS 1). Only safetensors are
read. Knows nothing of LoRA, losses or sampling.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from cffa_core.errors import InvalidSpec, ModelUnavailable, Problem
from cffa_core.models.base_folder import base_files, digest_of
from cffa_core.models.fetch import find_base

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Base:
    """A loaded base. The UNet is in ``dtype``; text encoder and VAE stay in float32, since they run once per image.

    ``digest`` is the SHA-256 over the digests of all files read; a trained model names it, and is refused on another
    base. All weights are frozen.
    """

    name: str
    folder: Path
    digest: str
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler_config: dict[str, Any]
    scaling_factor: float
    shift_factor: float
    device: torch.device
    dtype: torch.dtype

    @property
    def latent_channels(self) -> int:
        """Channels of a latent (4 for SD 1.5)."""
        return int(self.unet.config.in_channels)

    @property
    def latent_stride(self) -> int:
        """Pixels of the image per latent cell and side (8 for SD 1.5)."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape ``(C, H/8, W/8)`` of the latent of a square image; raises ``InvalidSpec`` if it does not divide."""
        if resolution % self.latent_stride:
            message = f"resolution {resolution} is not divisible by {self.latent_stride}"
            raise InvalidSpec(message, problems=(Problem("/resolution", "not_divisible", message),))
        side = resolution // self.latent_stride
        return (self.latent_channels, side, side)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Encode prompts to ``(B, 77, C)`` float32 (the text encoder's last hidden states).

        Raises ``InvalidSpec`` for a prompt longer than the tokenizer's limit: its end would be dropped silently.
        """
        return self.encode_prompts_open(prompts)

    def encode_prompts_open(self, prompts: Sequence[str]) -> torch.Tensor:
        """As :meth:`encode_prompts`, but with a gradient to the text encoder's weights where they are trained."""
        limit = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for prompt in prompts:
            length = len(self.tokenizer(prompt, verbose=False).input_ids)
            if length > limit:
                message = f"the prompt has {length} tokens, this base takes {limit}: {prompt[:60]!r}"
                raise InvalidSpec(message, problems=(Problem("/prompt", "prompt_too_long", message),))
        # One prompt per call: the embedding of a prompt must not depend on which others were asked for.
        rows = []
        for prompt in prompts:
            tokens = self.tokenizer([prompt], padding="max_length", max_length=limit, return_tensors="pt")
            rows.append(self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state)
        return torch.cat(rows).float()

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode ``(B, 3, H, W)`` in [-1, 1] to the moments ``(mean, logvar)``, each ``(B, 4, H/8, W/8)`` float32.

        Both are of the SCALED latent: ``x0 = mean + exp(logvar / 2) * randn`` is what the UNet sees.
        """
        distribution = self.vae.encode(images.to(self.device, torch.float32)).latent_dist
        mean = (distribution.mean - self.shift_factor) * self.scaling_factor
        return mean, distribution.logvar + 2 * math.log(self.scaling_factor)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode scaled latents ``(B, 4, H/8, W/8)`` to images ``(B, 3, H, W)``, float32, clamped to [-1, 1]."""
        return self.decode_open(latents).clamp(-1, 1)

    def decode_open(self, latents: torch.Tensor) -> torch.Tensor:
        """As :meth:`decode`, but with a gradient to ``latents`` and not clamped (a clamped pixel would have none)."""
        unscaled = latents.to(self.device, torch.float32) / self.scaling_factor + self.shift_factor
        images: torch.Tensor = self.vae.decode(unscaled).sample
        return images


def load_base(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Precision = torch.float32,
    models_dir: Path | None = None,
) -> Base:
    """Load a base: ``"tiny"``, the name of a folder in ``models_dir``, a local folder, or a hub id.

    Raises :class:`ModelUnavailable`, naming what is missing, when the base cannot be had or is not usable.
    """
    folder, name = find_base(ref, models_dir=models_dir)
    files = base_files(folder)
    for path in files:
        if path.suffix == ".json":  # the tokenizer's library has no error of its own for a damaged file
            _read_json(path)
    scheduler_config = _read_json(folder / "scheduler" / "scheduler_config.json")
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction != "epsilon":
        raise ModelUnavailable(f"base {name!r} predicts {prediction!r}; only bases that predict epsilon are supported")
    target, unet_dtype = torch.device(device), DTYPES[dtype] if isinstance(dtype, str) else dtype
    with quiet():
        tokenizer = _tokenizer(folder / "tokenizer")
        text_encoder = _weights(CLIPTextModel, folder / "text_encoder", dtype=torch.float32)
        vae = _weights(AutoencoderKL, folder / "vae", torch_dtype=torch.float32)
        unet = _weights(UNet2DConditionModel, folder / "unet", torch_dtype=unet_dtype)
    if unet.config.in_channels != vae.config.latent_channels or unet.config.out_channels != unet.config.in_channels:
        raise ModelUnavailable(f"base {name!r}: the UNet's channels do not fit the VAE's latents")
    for module in (text_encoder, vae, unet):
        # Channels last is how convolutions compute: one sixth of a step less on a CPU, and what tensor cores want.
        module.requires_grad_(False).eval().to(target, memory_format=torch.channels_last)
    return Base(
        name=name,
        folder=folder,
        digest=digest_of(folder, files),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        unet=unet,
        scheduler_config=scheduler_config,
        scaling_factor=float(vae.config.scaling_factor),
        shift_factor=float(getattr(vae.config, "shift_factor", None) or 0.0),
        device=target,
        dtype=unet_dtype,
    )


def _tokenizer(folder: Path) -> CLIPTokenizer:
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library has no other for damaged merges
        raise ModelUnavailable(
            f"the tokenizer of base {folder.parent.name!r} cannot be read: {error}; copy or download the folder again"
        ) from error


def _weights(kind: Any, folder: Path, **options: Any) -> Any:
    """Load one model strictly: a weight that the file lacks would otherwise be random."""
    part = f"the {folder.name} of base {folder.parent.name!r}"
    again = "copy or download the folder again"
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelUnavailable(f"{part} cannot be loaded: {error}; {again}") from error
    absent = sorted(report["missing_keys"])
    if absent:
        raise ModelUnavailable(f"{part} lacks weights: {absent[:5]}; {again}")
    # The sum of a tensor is a number only if all of it is; looking at every value would take another copy of it.
    broken = [n for n, weight in model.named_parameters() if not weight.sum(dtype=torch.float32).isfinite()]
    if broken:
        raise ModelUnavailable(f"{part} holds NaN or infinity, first in {broken[0]}; {again}")
    return model


def _read_json(path: Path) -> dict[str, Any]:
    where = f"{path.parent.name}/{path.name} of base {path.parent.parent.name!r}"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{where} cannot be read: {error}; copy or download the folder again") from error
    if not isinstance(content, dict):
        raise ModelUnavailable(f"{where} is not a JSON object; copy or download the folder again")
    return content


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' loading bars off the terminal; the caller reports progress in its own words."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
