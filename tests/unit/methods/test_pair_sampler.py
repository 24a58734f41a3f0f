"""Sampling with a model: bit-identity in any company, guidance, the shared step noise, and the FA's one channel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.color import rgb2lab

from cffa_core.diffusion.sampling import build_scheduler, draw_noise
from cffa_core.errors import InvalidSpec
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, Scheduler, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import NewPair, PairSampler, chroma, to_uint8, write_png
from cffa_core.models.base import Base


@pytest.fixture(scope="module")
def model(base: Base) -> DualUnet:
    """A model whose LoRAs differ, as after training."""
    found = DualUnet(base, TrainSettings(lora=LoraSpec(rank=4)), noise_rotation=-np.eye(4))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return found


def sampler_of(model: DualUnet, batch_size: int = 4, resolution: int = 64, **options: Any) -> PairSampler:
    return PairSampler(model, SamplerSpec(**({"steps": 4} | options)), resolution, batch_size)


@pytest.mark.parametrize("resolution", [64, 72])
@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_a_pair_is_bit_identical_in_any_company(model: DualUnet, scheduler: Scheduler, resolution: int) -> None:
    sampler = sampler_of(model, resolution=resolution, scheduler=scheduler)
    (alone,) = sampler.draw([0], [77])
    first = sampler.draw([0, 1, 2], [77, 5, 6])[0]
    last = sampler.draw([3, 2, 1, 0], [8, 9, 5, 77])[3]
    latents = [sampler.latents([77, 77, 77, 77])[[0, 4]], sampler.latents([1, 2, 77, 3])[[2, 6]]]
    assert torch.equal(*latents)
    for other in (first, last):
        assert np.array_equal(alone.cf, other.cf) and np.array_equal(alone.fa, other.fa)
        assert alone.fa_chroma == other.fa_chroma


def test_guidance_keeps_bit_identity(model: DualUnet) -> None:
    sampler = sampler_of(model, guidance_scale=3.0)
    assert torch.equal(sampler.latents([77, 1, 2, 3])[[0, 4]], sampler.latents([4, 5, 6, 77])[[3, 7]])


@pytest.mark.parametrize(("scale", "rows"), [(1.0, 8), (2.5, 16)])
def test_guidance_scale_one_costs_no_second_forward(
    model: DualUnet, monkeypatch: pytest.MonkeyPatch, scale: float, rows: int
) -> None:
    calls: list[int] = []
    forward = model.unet.forward
    monkeypatch.setattr(model.unet, "forward", lambda x, *a, **k: calls.append(len(x)) or forward(x, *a, **k))
    sampler_of(model, guidance_scale=scale).draw([0], [1])
    assert calls == [rows] * 4


@torch.no_grad()
def test_guidance_uses_the_right_lora_for_each_row(model: DualUnet) -> None:
    """One guided DDIM step against four forwards of one row each."""
    base, options = model.base, {"steps": 1, "guidance_scale": 3.0, "negative_prompt": "blurred"}
    found = sampler_of(model, batch_size=1, **options).latents([9])
    spec = SamplerSpec(**options)
    texts = {"cf": spec.cf_prompt, "fa": spec.fa_prompt}
    z0 = sampler_of(model, batch_size=1, initial_noise="shared")
    noise = draw_noise([9], z0.shape, ["cf"], "shared", None, "z0")
    scheduler = build_scheduler(Scheduler.DDIM, base.scheduler_config, 1)
    t = scheduler.timesteps[0]
    for row, m in enumerate(("cf", "fa")):
        conditional, unconditional = (
            model.predict_noise(noise, t, base.encode_prompts([prompt]), [m]) for prompt in (texts[m], "blurred")
        )
        guided = unconditional + 3.0 * (conditional - unconditional)
        expected = scheduler.step(guided, t, noise).prev_sample[0]
        torch.testing.assert_close(found[row], expected, rtol=1e-3, atol=1e-3)


def twins(base: Base, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Final latents of two branches that differ in nothing but their noise (fresh LoRA, same prompt)."""
    twin = DualUnet(base, TrainSettings(lora=LoraSpec(rank=4)), noise_rotation=-np.eye(4))
    sampler = sampler_of(twin, cf_prompt="an eye", fa_prompt="an eye", **options)
    cf, fa = sampler.latents([1, 2, 3, 4]).chunk(2)
    return cf, fa


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_shared_noise_gives_both_branches_the_same_numbers(base: Base, scheduler: Scheduler) -> None:
    assert torch.equal(*twins(base, scheduler=scheduler))


def test_the_first_implementation_can_be_repeated(base: Base) -> None:
    """Ancestral DDPM with a shared start and separate per-step noise: the branches drift apart."""
    cf, fa = twins(base, scheduler="ddpm", steps=20, step_noise="independent")
    assert np.corrcoef(cf.flatten(), fa.flatten())[0, 1] < 0.8
    assert torch.equal(*twins(base, scheduler="ddpm", steps=20))


def test_step_noise_follows_initial_noise_unless_told(base: Base) -> None:
    assert torch.equal(
        torch.cat(twins(base, scheduler="ddpm", initial_noise="rotated")),
        torch.cat(twins(base, scheduler="ddpm", initial_noise="rotated", step_noise="rotated")),
    )
    assert not torch.equal(
        torch.cat(twins(base, scheduler="ddpm", initial_noise="rotated")),
        torch.cat(twins(base, scheduler="ddpm", initial_noise="rotated", step_noise="shared")),
    )


def test_a_sampler_that_names_no_noise_takes_the_best_the_model_has(base: Base) -> None:
    twin = DualUnet(base, TrainSettings(lora=LoraSpec(rank=4)), noise_rotation=-np.eye(4))
    assert sampler_of(twin).initial_noise == sampler_of(twin).step_noise == "shared"
    twin.band_rotations = np.stack([np.eye(4)] * 3 + [-np.eye(4)] * 3)
    unnamed, named = sampler_of(twin), sampler_of(twin, initial_noise="banded")
    assert unnamed.initial_noise == unnamed.step_noise == "banded"
    assert torch.equal(unnamed.latents([1, 2]), named.latents([1, 2]))
    assert not torch.equal(unnamed.latents([1, 2]), sampler_of(twin, initial_noise="shared").latents([1, 2]))
    assert sampler_of(twin, initial_noise="shared").initial_noise == "shared"


def test_banded_noise_needs_a_model_that_has_rotations(base: Base) -> None:
    twin = DualUnet(base, TrainSettings(lora=LoraSpec(rank=4)), noise_rotation=-np.eye(4))
    with pytest.raises(InvalidSpec, match="no noise rotation"):
        sampler_of(twin, initial_noise="banded").latents([1])


def test_another_seed_is_another_pair(model: DualUnet) -> None:
    a, b = sampler_of(model).draw([0, 1], [1, 2])
    assert not np.array_equal(a.cf, b.cf)


def test_the_batch_has_limits(model: DualUnet) -> None:
    with pytest.raises(ValueError, match="1 to 4 seeds"):
        sampler_of(model).draw(range(5), range(5))


def test_fa_is_opencv_luminance_of_the_decoded_image(model: DualUnet) -> None:
    sampler = sampler_of(model, batch_size=1)
    (pair,) = sampler.draw([0], [3])
    decoded = to_uint8(model.base.decode(sampler.latents([3])[1:])[0])
    assert pair.fa is not None and pair.fa.shape == (64, 64) and pair.fa.dtype == np.uint8
    by_hand = decoded.astype(float) @ [0.299, 0.587, 0.114]
    assert np.abs(pair.fa - by_hand).max() <= 1
    assert pair.fa_chroma == pytest.approx(np.abs(rgb2lab(decoded)[..., 1:]).mean(), abs=0.05)


def test_chroma() -> None:
    grey = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    assert chroma(grey) < 0.05
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    assert chroma(red) == pytest.approx((80.1 + 67.2) / 2, abs=0.2)


def test_to_uint8_covers_the_range() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1)
    assert to_uint8(image).tolist() == [[[0, 128, 255]]]


def test_saved_files_are_the_pixels_and_repeatable(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pair = NewPair(17, 99, pixels, np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)), 1.5)
    entry = pair.save(tmp_path / "a")
    assert entry == pair.save(tmp_path / "b")
    assert entry["cf"]["name"] == "cf/000017.png" and entry["fa"]["name"] == "fa/000017.png"
    assert entry["cf"]["size"] == (tmp_path / "a/cf/000017.png").stat().st_size
    with Image.open(tmp_path / "a/cf/000017.png") as cf, Image.open(tmp_path / "a/fa/000017.png") as fa:
        assert (cf.mode, fa.mode) == ("RGB", "L")
        assert np.array_equal(np.asarray(cf), pixels)


def test_generated_images_are_marked_and_others_are_not(tmp_path: Path) -> None:
    grey = np.full((16, 16), 100, np.uint8)
    NewPair(17, 99, None, grey, 1.5).save(tmp_path, "other")
    write_png(tmp_path, "sheet.png", grey)
    with Image.open(tmp_path / "fa/other.png") as fa, Image.open(tmp_path / "sheet.png") as sheet:
        marks = {"Software": "CFFA", "Synthetic Data": "YES", "Modality": "FA", "Index": "17", "Seed": "99"}
        assert fa.text == marks and sheet.text == {}
        assert np.array_equal(np.asarray(fa), np.asarray(sheet))
