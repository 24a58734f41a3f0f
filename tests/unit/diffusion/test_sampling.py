"""The denoising loop and its noise against diffusers' own pipeline and step."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from cffa_core import rng
from cffa_core.diffusion.rotation import rotate
from cffa_core.diffusion.sampling import build_scheduler, ddpm_step, denoise, draw_noise
from cffa_core.errors import InvalidSpec
from cffa_core.jobs.spec import NoiseMode, Scheduler
from cffa_core.models.base import Base

SHAPE = (4, 8, 8)
MIRROR = -np.eye(4)
BANDS = np.stack([MIRROR] * 3 + [-MIRROR[::-1]] * 3)
DETERMINISTIC = [kind for kind in Scheduler if kind is not Scheduler.DDPM]


def no_noise(_: int) -> torch.Tensor:
    raise AssertionError("a deterministic sampler asked for noise")


@pytest.mark.parametrize("kind", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 7])
def test_each_sampler_ends_where_diffusers_pipeline_ends(base: Base, kind: Scheduler, steps: int) -> None:
    text = base.encode_prompts(["a retina"])
    noise = draw_noise([5], SHAPE, ["cf"], "shared", None, "z0")

    @torch.no_grad()
    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return base.unet(x, t, text).sample

    ours = denoise(predict, build_scheduler(kind, base.scheduler_config, steps), noise, no_noise)
    pipeline = StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        scheduler=build_scheduler(kind, base.scheduler_config, steps),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=text, latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="latent"
    ).images
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_timesteps_start_at_noise_whatever_scheduler_the_base_was_saved_with() -> None:
    saved = {"num_train_timesteps": 1000, "steps_offset": 1, "timestep_spacing": "leading"}
    first = {kind: float(build_scheduler(kind, saved, 50).timesteps[0]) for kind in Scheduler}
    assert first == {
        Scheduler.DDIM: 981,
        Scheduler.PNDM: 981,
        Scheduler.DDPM: 981,
        Scheduler.DPM: 999,
        Scheduler.UNIPC: 999,
        Scheduler.EULER: 999,
    }
    trailing = saved | {"timestep_spacing": "trailing"}
    assert float(build_scheduler(Scheduler.DDIM, trailing, 50).timesteps[0]) == 999


@pytest.mark.parametrize("steps", [4, 50])
def test_the_ancestral_step_is_diffusers_step_with_the_same_noise(base: Base, steps: int) -> None:
    scheduler = build_scheduler(Scheduler.DDPM, base.scheduler_config, steps)
    x, predicted = (torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    for t in scheduler.timesteps:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t)))
        theirs = scheduler.step(predicted, t, x, generator=torch.Generator().manual_seed(int(t))).prev_sample
        torch.testing.assert_close(ddpm_step(scheduler, predicted, int(t), x, noise), theirs, rtol=1e-4, atol=1e-5)


def test_the_ancestral_chain_keeps_the_data_s_spread() -> None:
    """For data N(0, s^2) the best prediction is known, and the chain must end with that spread."""
    scheduler = build_scheduler(Scheduler.DDPM, DDPMScheduler(beta_schedule="scaled_linear").config, 250)
    spread = 0.5

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = scheduler.alphas_cumprod[t]
        return x * (1 - alpha_bar).sqrt() / (alpha_bar * spread**2 + 1 - alpha_bar)

    def noise_at(i: int) -> torch.Tensor:
        return torch.randn(1, 4, 64, 64, generator=rng.generator("chain", i))

    x0 = denoise(predict, scheduler, torch.randn(1, 4, 64, 64, generator=rng.generator("z")), noise_at)
    assert x0.std().item() == pytest.approx(spread, rel=0.05)


# Euler has no clipping to switch on, and its sample another scale.
@pytest.mark.parametrize("kind", [kind for kind in Scheduler if kind is not Scheduler.EULER])
def test_latents_are_never_clipped(base: Base, kind: Scheduler) -> None:
    loose = {k: v for k, v in base.scheduler_config.items() if k != "clip_sample"}
    x0 = 3 * torch.randn(1, *SHAPE, generator=rng.generator("x0"))
    scheduler = build_scheduler(kind, loose, 30)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha_bar = scheduler.alphas_cumprod[int(t)]
        return (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    found = denoise(predict, scheduler, torch.randn(1, *SHAPE, generator=rng.generator("z")), lambda _: torch.zeros(1))
    assert (found - x0).abs().max() < 0.2 < x0.abs().max() - 1


@pytest.mark.parametrize("mode", get_args(NoiseMode))
def test_noise_depends_on_seed_and_label_alone(mode: Any) -> None:
    alone = draw_noise([11], SHAPE, ["cf", "fa"], mode, MIRROR, "step 3", BANDS)
    among = draw_noise([7, 8, 11, 9], SHAPE, ["cf", "fa"], mode, MIRROR, "step 3", BANDS)
    assert torch.equal(among[[2, 6]], alone)
    assert not torch.equal(draw_noise([11], SHAPE, ["cf", "fa"], mode, MIRROR, "step 4", BANDS), alone)
    assert torch.equal(draw_noise([11], SHAPE, ["fa"], mode, MIRROR, "step 3", BANDS), alone[1:])


def test_how_the_branches_noises_are_related() -> None:
    def halves(mode: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cf, fa = draw_noise([1, 2], SHAPE, ["cf", "fa"], mode, MIRROR[::-1].copy(), "z0").chunk(2)
        return cf, fa

    cf, fa = halves("shared")
    assert torch.equal(cf, fa)
    cf, fa = halves("rotated")
    assert torch.equal(fa, -cf.flip(1))
    assert torch.equal(fa[0], rotate(cf[0], MIRROR[::-1].copy()))
    cf, fa = halves("independent")
    assert abs(np.corrcoef(cf.flatten(), fa.flatten())[0, 1]) < 0.15


def test_rotated_without_a_rotation_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="no noise rotation"):
        draw_noise([1], SHAPE, ["cf", "fa"], "rotated", None, "z0", BANDS)
    with pytest.raises(InvalidSpec, match="no noise rotation"):
        draw_noise([1], SHAPE, ["cf", "fa"], "banded", MIRROR, "z0")


@pytest.mark.parametrize("kind", list(Scheduler))
def test_progress_reaches_its_total(base: Base, kind: Scheduler) -> None:
    seen: list[tuple[int, int]] = []
    denoise(
        lambda x, t: torch.zeros_like(x),
        build_scheduler(kind, base.scheduler_config, 5),
        torch.zeros(1, *SHAPE),
        lambda i: torch.zeros(1, *SHAPE),
        lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
