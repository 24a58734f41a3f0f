"""The losses of METHODS 2, and the noise schedule they are written in.

All tensors are latents ``(B, C, h, w)`` in float32; masks are ``(B, 1, h, w)`` bool and say where a modality was seen.
Every term is a mean over the valid cells of each row, weighted per row, then a mean over rows; a row with no valid cell
counts as 0. Pure functions: no model, no randomness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from cffa_core.errors import ModelUnavailable
from cffa_core.jobs.spec import LossSpec

BLUR_KERNEL, BLUR_SIGMA = 7, 1.5
PRED_X0_LIMIT = 10.0
SOBEL_FLOOR = 1e-6
# The edge size `e` of NGF, in units of the unnormalised Sobel: gradients well below it count as noise, not structure.
NGF_EDGE = 1.0

# (pred_x0, x0, valid) -> distance of each row (B,)
Perceptual = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModalityLatents:
    """One modality inside a training step: what was noised, with what, and what the UNet said."""

    x0: torch.Tensor
    x_t: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    valid: torch.Tensor
    predicted_noise: torch.Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """``alpha_bar`` of the base's training schedule, ``(T,)`` float32 (Ho et al. 2020, arXiv:2006.11239)."""

    alpha_bar: torch.Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """Build it from ``scheduler_config.json``; raises ``ModelUnavailable`` for an unknown beta schedule."""
        count = int(config.get("num_train_timesteps", 1000))
        start, end = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        kind = config.get("beta_schedule", "linear")
        if kind == "scaled_linear":
            betas = np.linspace(start**0.5, end**0.5, count) ** 2
        elif kind == "linear":
            betas = np.linspace(start, end, count)
        else:
            raise ModelUnavailable(f"the base was trained with beta schedule {kind!r}, which is not supported")
        return cls(torch.from_numpy(np.cumprod(1 - betas)).float())

    @property
    def steps(self) -> int:
        """Number of training timesteps T."""
        return len(self.alpha_bar)

    def at(self, timesteps: torch.Tensor) -> torch.Tensor:
        """``alpha_bar`` of each row, ``(B, 1, 1, 1)``."""
        return self.alpha_bar.to(timesteps.device)[timesteps].view(-1, 1, 1, 1)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps``."""
        alpha_bar = self.at(timesteps)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def predict_x0(self, x_t: torch.Tensor, predicted_noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """``pred_x0 = (x_t - sqrt(1 - alpha_bar) eps_hat) / sqrt(alpha_bar)``."""
        alpha_bar = self.at(timesteps)
        return (x_t - (1 - alpha_bar).sqrt() * predicted_noise) / alpha_bar.sqrt()

    def snr(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Signal-to-noise ratio ``alpha_bar / (1 - alpha_bar)`` of each row, ``(B,)``."""
        alpha_bar = self.alpha_bar.to(timesteps.device)[timesteps]
        return alpha_bar / (1 - alpha_bar)


def pair_loss(
    branches: Mapping[str, ModalityLatents],
    schedule: NoiseSchedule,
    spec: LossSpec,
    perceptual: Perceptual | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``L = sum_m (MSE_m + hf_lambda HF_m + lpips_lambda LPIPS_m) + struct_lambda L_struct`` and its terms, detached.

    ``branches`` maps ``cf`` and ``fa`` (or one alone: then there is no L_struct) to what they predicted. Raises
    ``ModelUnavailable`` if ``lpips_lambda > 0`` and there is no ``perceptual`` distance.
    """
    if spec.lpips_lambda and perceptual is None:
        raise ModelUnavailable("lpips_lambda > 0 needs the weights of LPIPS")
    terms: dict[str, torch.Tensor] = {}
    pred_x0 = {m: schedule.predict_x0(b.x_t, b.predicted_noise, b.timesteps) for m, b in branches.items()}
    weight = {m: x0_weight(schedule.snr(b.timesteps), spec) for m, b in branches.items()}
    total = torch.zeros((), device=next(iter(branches.values())).x0.device)
    for m, branch in branches.items():
        mse = masked_mean((branch.predicted_noise - branch.noise).square(), branch.valid)
        terms[f"eps_{m}"] = (mse * eps_weight(schedule.snr(branch.timesteps), spec)).mean()
        hf = masked_mean((high_pass(pred_x0[m]) - high_pass(branch.x0)).abs(), branch.valid)
        terms[f"hf_{m}"] = (hf * weight[m]).mean()
        total = total + terms[f"eps_{m}"] + spec.hf_lambda * terms[f"hf_{m}"]
        if spec.lpips_lambda and perceptual is not None:
            terms[f"lpips_{m}"] = (perceptual(pred_x0[m], branch.x0, branch.valid) * weight[m]).mean()
            total = total + spec.lpips_lambda * terms[f"lpips_{m}"]
    if len(branches) == 2:
        cf, fa = (pred_x0[m].clamp(-PRED_X0_LIMIT, PRED_X0_LIMIT) for m in ("cf", "fa"))
        per_cell = ngf_distance(cf, fa) if spec.struct_loss == "ngf" else sobel_distance(cf, fa)
        struct = masked_mean(per_cell, erode(branches["cf"].valid & branches["fa"].valid))
        terms["struct"] = (struct * torch.minimum(weight["cf"], weight["fa"])).mean()
        total = total + spec.struct_lambda * terms["struct"]
    return total, {name: term.detach() for name, term in terms.items()}


def x0_weight(snr: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    """Weight of the terms on pred_x0, ``(B,)``: 1, or ``min(1, SNR)``, since pred_x0's error grows as SNR^(-1/2)."""
    return snr.clamp(max=1.0) if spec.x0_weighting == "min_snr" else torch.ones_like(snr)


def eps_weight(snr: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    """Weight of the noise loss, ``(B,)``: 1, or ``min(SNR, gamma) / SNR`` (Hang et al. 2023, arXiv:2303.09556)."""
    return snr.clamp(max=spec.min_snr_gamma) / snr if spec.eps_weighting == "min_snr_gamma" else torch.ones_like(snr)


def masked_mean(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean of ``(B, C, h, w)`` over the valid cells of each row, ``(B,)``; 0 for a row without any."""
    kept = torch.where(valid, values, torch.zeros_like(values)).flatten(1).sum(1)
    return kept / (valid.flatten(1).sum(1) * values.shape[1]).clamp(min=1)


def erode(valid: torch.Tensor, cells: int = 1) -> torch.Tensor:
    """Shrink ``(B, 1, h, w)`` by ``cells``, so that no 3x3 stencil inside reaches an invalid cell.

    The border of the latent itself does not erode: stencils repeat its last cell.
    """
    size = 2 * cells + 1
    return F.max_pool2d((~valid).float(), size, stride=1, padding=cells) == 0


def latent_mask(valid: torch.Tensor, stride: int) -> torch.Tensor:
    """Bring a pixel mask ``(B, 1, H, W)`` to latent cells; a cell is valid if ALL its pixels are."""
    return F.max_pool2d((~valid).float(), stride) == 0


def blur(x: torch.Tensor) -> torch.Tensor:
    """Gaussian blur, kernel 7, sigma 1.5, each channel by itself, borders reflected."""
    positions = torch.arange(BLUR_KERNEL, dtype=torch.float32, device=x.device) - BLUR_KERNEL // 2
    line = torch.exp(-0.5 * (positions / BLUR_SIGMA) ** 2)
    line = (line / line.sum()).to(x.dtype)
    channels, pad = x.shape[1], BLUR_KERNEL // 2
    padded = F.pad(x, (pad, pad, pad, pad), mode="reflect")
    rows = F.conv2d(padded, line.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(rows, line.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)


def high_pass(x: torch.Tensor) -> torch.Tensor:
    """``x - blur(x)``: what the HF loss compares."""
    return x - blur(x)


def sobel(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sobel gradients ``(gx, gy)`` per channel, unnormalised (weights 1, 2, 1), borders repeated."""
    channels = x.shape[1]
    smooth = torch.tensor([1.0, 2.0, 1.0], device=x.device, dtype=x.dtype)
    slope = torch.tensor([-1.0, 0.0, 1.0], device=x.device, dtype=x.dtype)
    kernel_x = torch.outer(smooth, slope).view(1, 1, 3, 3).repeat(channels, 1, 1, 1)
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    gx = F.conv2d(padded, kernel_x, groups=channels)
    return gx, F.conv2d(padded, kernel_x.transpose(2, 3), groups=channels)


def sobel_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``| |sobel(a)| - |sobel(b)| |`` per cell and channel; the square root is kept off 0, where it has no gradient."""

    def magnitude(x: torch.Tensor) -> torch.Tensor:
        gx, gy = sobel(x)
        return (gx.square() + gy.square() + SOBEL_FLOOR).sqrt()

    return (magnitude(a) - magnitude(b)).abs()


def ngf_distance(a: torch.Tensor, b: torch.Tensor, edge: float = NGF_EDGE) -> torch.Tensor:
    """``1 - <grad a, grad b>^2 / ((|grad a|^2 + e^2)(|grad b|^2 + e^2))`` per cell and channel.

    Normalised gradient fields (Haber & Modersitzki 2006): blind to the sign of contrast, which CF and FA have reversed.
    """
    (ax, ay), (bx, by) = sobel(a), sobel(b)
    inner = ax * bx + ay * by
    return 1 - inner.square() / ((ax.square() + ay.square() + edge**2) * (bx.square() + by.square() + edge**2))
