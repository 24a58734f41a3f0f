"""Draw pairs: ONE initial noise per pair for both branches, then a plain denoising loop (METHODS 2, Sampling).

Every random number of a pair depends only on (its seed, the step, the branch), never on its batch, so a pair is
bit-identical whoever its neighbours are. Schedulers are diffusers'. Knows no UNet: it is given ``predict``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray

from cffa_core import rng
from cffa_core.diffusion.rotation import rotate, rotate_bands
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import NoiseMode, Scheduler

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
NoiseAt = Callable[[int], torch.Tensor]

# Latents have no natural range, so x0 is never clipped or thresholded, whatever the base's configuration leaves open.
_LATENTS = {"clip_sample": False, "thresholding": False}


def build_scheduler(kind: Scheduler, config: Mapping[str, Any], steps: int) -> Any:
    """Make the diffusers scheduler of ``kind`` on the base's noise schedule, set to ``steps``.

    DDIM (Song et al. 2021), PNDM (Liu et al. 2022, without the Runge-Kutta start), DPM-Solver++(2M) (Lu et al. 2022),
    UniPC (Zhao et al. 2023), Euler (Karras et al. 2022, algorithm 1), DDPM (Ho et al. 2020). Each keeps its own
    spacing of the timesteps: a base's file states that of the scheduler it was saved with ("leading" would start
    DPM-Solver++ at t = 951, where the noise is no longer pure). Only "trailing" is a property of the base.
    """
    classes: dict[Scheduler, tuple[Any, dict[str, Any]]] = {
        Scheduler.DDIM: (DDIMScheduler, _LATENTS),
        Scheduler.PNDM: (PNDMScheduler, {"skip_prk_steps": True}),
        Scheduler.DPM: (
            DPMSolverMultistepScheduler,
            {"algorithm_type": "dpmsolver++", "solver_order": 2, "thresholding": False},
        ),
        Scheduler.UNIPC: (UniPCMultistepScheduler, {"thresholding": False}),
        Scheduler.EULER: (EulerDiscreteScheduler, {}),
        Scheduler.DDPM: (DDPMScheduler, _LATENTS | {"variance_type": "fixed_small"}),
    }
    scheduler_class, fixed = classes[kind]
    kept = {k: v for k, v in config.items() if not k.startswith("_")}
    if kept.get("timestep_spacing") != "trailing":
        kept.pop("timestep_spacing", None)
    scheduler = scheduler_class.from_config(kept | fixed)
    scheduler.set_timesteps(steps)
    return scheduler


def draw_noise(
    seeds: Sequence[int],
    shape: tuple[int, int, int],
    branches: Sequence[str],
    mode: NoiseMode,
    rotation: NDArray[np.float64] | None,
    label: str,
    bands: NDArray[np.float64] | None = None,
) -> torch.Tensor:
    """Standard normal noise ``(len(branches) * B, C, h, w)``: all rows of the first branch, then of the second.

    ``label`` names the use ("z0", "step 3"). shared: both branches get the same; rotated: ``FA = R CF``; banded:
    the same with the R of each band of spatial frequency; independent: FA draws its own. Drawn on the CPU, one
    generator per pair. Raises ``InvalidSpec`` for ``rotated`` or ``banded`` without R.
    """
    if (mode == "rotated" and rotation is None) or (mode == "banded" and bands is None):
        message = "this model has no noise rotation (too little common area in its training pairs)"
        raise InvalidSpec(message, problems=(Problem("/sampler/initial_noise", "no_noise_rotation", message),))
    rows: dict[str, list[torch.Tensor]] = {m: [] for m in branches}
    for seed in seeds:
        cf = torch.randn(shape, generator=rng.generator(seed, label))
        if mode == "independent":
            fa = torch.randn(shape, generator=rng.generator(seed, label, "fa"))
        elif mode == "rotated" and rotation is not None:
            fa = rotate(cf, rotation)
        elif mode == "banded" and bands is not None:
            fa = rotate_bands(cf, bands)
        else:
            fa = cf
        for m in branches:
            rows[m].append(cf if m == "cf" else fa)
    return torch.cat([torch.stack(rows[m]) for m in branches])


def denoise(
    predict: Predict,
    scheduler: Any,
    noise: torch.Tensor,
    step_noise: NoiseAt,
    on_step: Callable[[int, int], None] | None = None,
) -> torch.Tensor:
    """Run ``scheduler`` from ``noise`` ``(R, C, h, w)`` to ``x0``; ``predict(x, t)`` is the noise prediction.

    ``step_noise(i)`` is asked only by a stochastic sampler, once per step, for noise of all rows.
    """
    x: torch.Tensor = noise * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        predicted_noise = predict(scheduler.scale_model_input(x, t), t).float()
        if isinstance(scheduler, DDPMScheduler):
            x = ddpm_step(scheduler, predicted_noise, int(t), x, step_noise(i).to(x))
        else:
            x = scheduler.step(predicted_noise, t, x, return_dict=False)[0]
        if on_step is not None:
            on_step(i + 1, len(scheduler.timesteps))
    return x


def ddpm_step(
    scheduler: Any, predicted_noise: torch.Tensor, t: int, x: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """One ancestral step ``x_t -> x_{t-1}`` (Ho et al. 2020, equations 6 and 7) with the noise GIVEN.

    diffusers' own step draws it from a generator, so that two branches cannot be given the same or a rotated one; the
    test compares the two.
    """
    previous = int(scheduler.previous_timestep(t))
    alpha_bars: torch.Tensor = scheduler.alphas_cumprod
    alpha_bar = alpha_bars[t]
    alpha_bar_prev = alpha_bars[previous] if previous >= 0 else torch.ones(())
    alpha = alpha_bar / alpha_bar_prev
    pred_x0 = (x - (1 - alpha_bar).sqrt() * predicted_noise) / alpha_bar.sqrt()
    mean = (alpha_bar_prev.sqrt() * (1 - alpha) * pred_x0 + alpha.sqrt() * (1 - alpha_bar_prev) * x) / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha)
    return mean + variance.sqrt() * noise
