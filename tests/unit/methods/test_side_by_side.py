"""Side by side: the canvas and its halves, the one prompt, the losses of the halves, noise, company and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from cffa_core import rng
from cffa_core.diffusion.latents import LatentCache, Moments, Variant, View
from cffa_core.errors import Cancelled, InvalidSpec
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.methods.registry import load_method
from cffa_core.methods.side_by_side import SideBySide, halves, squeeze, stretch
from cffa_core.models.base import Base
from cffa_core.recipes.train import run_training
from tests.pair_folder import write_pair_folder

# The micro tokenizer spells every letter; the default prompts together are too long for it.
SHORT = {"cf_prompt": "CF", "fa_prompt": "FA"}


def settings_of(squeeze: bool = True, **options: Any) -> TrainSettings:
    given = {"lora": LoraSpec(rank=4), "resolution": 64, "side_by_side": {"squeeze": squeeze}}
    return TrainSettings(method="side_by_side", **(given | SHORT | options))


def trained(base: Base, squeeze: bool = True, **options: Any) -> SideBySide:
    """A model whose LoRA is not zero, as after training; its noise rotation is the sign."""
    model = SideBySide(base, settings_of(squeeze, **options), noise_rotation=-np.eye(4))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def sampler_of(model: SideBySide, batch_size: int = 4, **options: Any) -> PairSampler:
    return PairSampler(model, SamplerSpec(**({"steps": 3} | SHORT | options)), 64, batch_size)


def batch_of(model: SideBySide, size: int = 2) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(4)
    channels, height, width = model.noise_shape(64)
    x0 = {"pair": torch.randn(size, channels, height, 2 * width, generator=generator)}
    valid = {"pair": torch.ones(size, 1, height, 2 * width, dtype=torch.bool)}
    return x0, valid, {"pair": model.base.encode_prompts(["CF, beside FA"])}


def view() -> View:
    """A pair of 64 px; the FA lacks its left 9 columns."""
    generator = torch.Generator().manual_seed(5)
    cf, fa = (torch.rand(c, 64, 64, generator=generator) * 2 - 1 for c in (3, 1))
    valid_fa = torch.ones(1, 64, 64, dtype=torch.bool)
    valid_fa[..., :9] = False
    return View(cf, fa, torch.ones(1, 64, 64, dtype=torch.bool), valid_fa)


def test_the_squeezed_canvas_has_the_size_of_one_image(base: Base) -> None:
    pair = view()
    image, valid = SideBySide(base, settings_of()).views(pair)["pair"]
    assert image.shape == (3, 64, 64) and valid.shape == (1, 64, 64)
    for half, whole in zip(halves(image), (pair.cf, pair.fa.expand(3, -1, -1)), strict=True):
        pixels = np.ascontiguousarray(whole.permute(1, 2, 0).numpy())
        by_area = cv2.resize(pixels, (32, 64), interpolation=cv2.INTER_AREA)
        assert np.abs(half.permute(1, 2, 0).numpy() - by_area).max() < 1e-6
    cf, fa = halves(valid)
    # Column 4 of the squeezed FA is made of columns 8 and 9, of which one was not seen.
    assert cf.all() and fa.all(1)[0].tolist() == [False] * 5 + [True] * 27


def test_the_unsqueezed_canvas_is_twice_as_wide(base: Base) -> None:
    pair = view()
    image, valid = SideBySide(base, settings_of(squeeze=False)).views(pair)["pair"]
    assert torch.equal(image, torch.cat([pair.cf, pair.fa.expand(3, -1, -1)], 2))
    assert torch.equal(valid, torch.cat([pair.valid_cf, pair.valid_fa], 2))


@pytest.mark.parametrize("squeezed", [True, False])
def test_the_latent_s_halves_are_those_of_the_canvas(base: Base, squeezed: bool) -> None:
    """The canvas goes through the VAE as one image, and its mask comes out cell by cell."""
    model = SideBySide(base, settings_of(squeezed))

    class Named:
        name, cf, fa = "a", view().cf, view().fa
        valid_cf, valid_fa = view().valid_cf, view().valid_fa

    moments = LatentCache([Named()], base.encode_images, lambda x, _: x, model.views, 1).moments(0, Variant())
    width = 8 if squeezed else 16
    assert list(moments) == ["pair"] and moments["pair"].mean.shape == (4, 8, width)
    image, _ = model.views(view())["pair"]
    assert torch.equal(moments["pair"].mean, base.encode_images(image.unsqueeze(0))[0][0])
    found = model.moments_by_modality(moments)
    assert isinstance(found["fa"], Moments)
    assert torch.equal(torch.cat([found["cf"].mean, found["fa"].mean], -1), moments["pair"].mean)
    assert torch.equal(torch.cat([found["cf"].logvar, found["fa"].logvar], -1), moments["pair"].logvar)
    # 9 columns lie in two cells of 8, squeezed (5 columns) in one.
    lost = 1 if squeezed else 2
    assert found["cf"].valid.all()
    assert found["fa"].valid.all(1)[0].tolist() == [False] * lost + [True] * (width // 2 - lost)


def test_join_and_cut_are_inverse(base: Base) -> None:
    model = SideBySide(base, settings_of())
    assert model.noise_shape(64) == (4, 8, 4) and model.noise_shape(128) == (4, 16, 8)
    rows = torch.randn(6, 4, 8, 4, generator=torch.Generator().manual_seed(1))
    canvases = model.join(rows)
    assert canvases.shape == (3, 4, 8, 8)
    assert torch.equal(torch.cat(halves(canvases)), rows)
    assert SideBySide(base, settings_of(squeeze=False)).noise_shape(64) == (4, 8, 8)


def test_a_cut_through_a_latent_cell_is_refused(base: Base) -> None:
    with pytest.raises(InvalidSpec, match=r"72 is not divisible by 16.*squeeze = false") as caught:
        SideBySide(base, settings_of(resolution=72))
    assert caught.value.problems[0].pointer == "/resolution"
    with pytest.raises(InvalidSpec, match="72 is not divisible by 16"):
        PairSampler(trained(base), SamplerSpec(**SHORT), 72, 1)
    assert SideBySide(base, settings_of(squeeze=False, resolution=72)).noise_shape(72) == (4, 9, 9)


def test_stretch_is_bicubic_and_undoes_squeeze_on_smooth_images() -> None:
    pixels = np.random.default_rng(0).uniform(-0.9, 0.9, (16, 16, 3)).astype(np.float32)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    bicubic = cv2.resize(pixels, (32, 16), interpolation=cv2.INTER_CUBIC).clip(-1, 1)
    assert np.abs(stretch(image).permute(1, 2, 0).numpy() - bicubic).max() < 1e-5
    wave = torch.sin(torch.linspace(0, 6, 64)).expand(3, 64, 64)
    assert (stretch(squeeze(wave)) - wave)[..., 4:-4].abs().max() < 0.01
    assert stretch(torch.eye(8).expand(3, 8, 8) * 2 - 1).abs().max() <= 1


@pytest.mark.parametrize("squeezed", [True, False])
def test_a_sample_is_cut_in_the_middle(base: Base, squeezed: bool) -> None:
    model = trained(base, squeezed)
    sampler = sampler_of(model, 2)
    latents = sampler.latents([1, 2])
    assert len(latents) == 2
    pairs = sampler.draw([0, 1], [1, 2])
    for place, pair in enumerate(pairs):
        assert pair.cf is not None and pair.fa is not None
        assert pair.cf.shape == (64, 64, 3) and pair.fa.shape == (64, 64)
        canvas = base.decode(latents[place].unsqueeze(0))[0]
        assert canvas.shape == (3, 64, 64 if squeezed else 128)
        left = canvas[..., : canvas.shape[-1] // 2].permute(1, 2, 0).numpy()
        wide = cv2.resize(np.ascontiguousarray(left), (64, 64), interpolation=cv2.INTER_CUBIC) if squeezed else left
        assert np.abs(pair.cf - (wide.clip(-1, 1) + 1) * 127.5).max() < 0.6


def test_one_prompt_is_made_of_both(base: Base) -> None:
    model = SideBySide(base, settings_of())
    assert model.prompts("a photograph", "an angiogram") == {"pair": "a photograph, beside an angiogram"}


def test_a_joined_prompt_too_long_for_the_base_is_refused(base: Base, tmp_path: Path) -> None:
    dataset = write_pair_folder(tmp_path / "pairs", n=2)
    settings = TrainSettings(method="side_by_side", resolution=64, steps=1, lora=LoraSpec(rank=2))
    with pytest.raises(InvalidSpec, match=r"shorten cf_prompt or fa_prompt: the prompt has .* tokens, this base takes"):
        run_training(settings, dataset, base.folder, tmp_path / "out", FolderContext(tmp_path / "out"))
    with pytest.raises(InvalidSpec, match="ONE prompt for both images"):
        PairSampler(trained(base), SamplerSpec(cf_prompt="a" * 40, fa_prompt="b" * 40), 64, 1)


def test_the_halves_have_losses_of_their_own(base: Base) -> None:
    """Recomputed by hand from what the UNet said of the whole canvas; half of the FA was not seen."""
    model = trained(base)
    x0, valid, text = batch_of(model)
    valid["pair"][..., 4:6] = False
    t, noise = {"pair": torch.tensor([300, 700])}, {"pair": torch.randn(2, 4, 8, 8)}
    loss, terms = model.loss_at(x0, valid, text, t, noise)
    x_t = model.schedule.add_noise(x0["pair"], noise["pair"], t["pair"])
    said = model.predict_noise(x_t, t["pair"], text["pair"].expand(2, -1, -1), ["pair"] * 2)
    error = (said - noise["pair"]).square()
    assert terms["eps_cf"].item() == pytest.approx(error[..., :4].mean().item(), rel=1e-5)
    assert terms["eps_fa"].item() == pytest.approx(error[..., 6:].mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx((terms["eps_cf"] + terms["eps_fa"]).item())
    more = trained(base, loss={"hf_lambda": 0.5, "struct_lambda": 0.3})
    whole, terms = more.loss_at(x0, valid, text, t, noise)
    extra = 0.5 * (terms["hf_cf"] + terms["hf_fa"]) + 0.3 * terms["struct"]
    assert whole.item() == pytest.approx((loss + extra).item(), rel=1e-5) and extra > 0


def test_the_structure_term_compares_the_halves(base: Base) -> None:
    model = trained(base, loss={"struct_lambda": 0.3})
    x0, valid, text = batch_of(model)
    t, noise = {"pair": torch.tensor([20, 20])}, {"pair": torch.zeros(2, 4, 8, 8)}
    terms = {}
    for name, fa in (("equal", halves(x0["pair"])[0]), ("other", halves(x0["pair"])[1])):
        canvas = {"pair": torch.cat([halves(x0["pair"])[0], fa], -1)}
        terms[name] = model.loss_at(canvas, valid, text, t, noise)[1]["struct"]
    assert terms["equal"] < 0.5 * terms["other"]


def test_training_draws_one_noise_for_the_canvas(base: Base) -> None:
    t, noise = SideBySide(base, settings_of()).draw(torch.Size((64, 4, 8, 8)), rng.generator(1))
    assert list(noise) == ["pair"] and t["pair"].shape == (64,)
    cf, fa = halves(noise["pair"])
    assert abs(np.corrcoef(cf.flatten(), fa.flatten())[0, 1]) < 0.05


@pytest.mark.parametrize(("mode", "sign"), [(None, 0), ("independent", 0), ("shared", 1), ("rotated", -1)])
def test_the_noise_of_the_halves(base: Base, monkeypatch: pytest.MonkeyPatch, mode: Any, sign: int) -> None:
    model = trained(base)
    seen: list[torch.Tensor] = []
    predict = model.predict_noise
    monkeypatch.setattr(model, "predict_noise", lambda x, *a: seen.append(x) or predict(x, *a))
    sampler_of(model, initial_noise=mode).latents([1, 2, 3, 4])
    assert seen[0].shape == (4, 4, 8, 8)
    cf, fa = halves(seen[0])
    if sign:
        assert torch.equal(fa, sign * cf)
    else:
        assert abs(np.corrcoef(cf.flatten(), fa.flatten())[0, 1]) < 0.15


@pytest.mark.parametrize(
    "options",
    [{}, {"scheduler": "ddpm"}, {"scheduler": "euler", "guidance_scale": 3.0}, {"initial_noise": "shared"}],
)
@pytest.mark.parametrize("squeezed", [True, False])
def test_a_pair_is_bit_identical_in_any_company(base: Base, options: dict[str, Any], squeezed: bool) -> None:
    sampler = sampler_of(trained(base, squeezed), **options)
    assert torch.equal(sampler.latents([77, 1, 2, 3])[0], sampler.latents([4, 5, 6, 77])[3])
    (alone,), last = sampler.draw([0], [77]), sampler.draw([3, 2, 0], [8, 9, 77])[2]
    assert np.array_equal(alone.cf, last.cf) and np.array_equal(alone.fa, last.fa)


@torch.no_grad()
def test_the_lora_file_is_one_that_stock_diffusers_reads(base: Base, tmp_path: Path) -> None:
    model = trained(base)
    card = model.save(tmp_path / "model", dataset_digest="d", validation=None)
    assert list(card["parameters"]) == ["pair"] and card["settings"]["side_by_side"] == {"squeeze": True}
    fused = UNet2DConditionModel.from_pretrained(base.folder / "unet", use_safetensors=True)
    fused.load_lora_adapter(tmp_path / "model", weight_name="lora_pair.safetensors", prefix="unet")
    fused.fuse_lora()
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 32)
    ours, stock = model.predict_noise(x, torch.tensor(500), text, ["pair"] * 2), fused(x, 500, text).sample
    assert (ours - stock).abs().max() < 1e-4 * stock.abs().max()
    again = load_method(tmp_path / "model", base)
    assert isinstance(again, SideBySide) and again.squeezed
    assert torch.equal(again.predict_noise(x, torch.tensor(500), text, ["pair"] * 2), ours)


def test_a_few_steps_lower_the_loss(base: Base) -> None:
    model = SideBySide(base, settings_of())
    optimizer = torch.optim.AdamW(model.lora.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, _ = model.training_loss(*batch_of(model), rng.generator("the same draw"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


class StoppingContext(FolderContext):
    """A context whose job is cancelled after training step 3."""

    def progress(self, stage: str, current: int, total: int) -> None:
        if (stage, current) == ("training", 3):
            raise Cancelled("stopped by the test")


def test_resume_is_bit_identical(base: Base, tmp_path: Path) -> None:
    dataset = write_pair_folder(tmp_path / "pairs", n=5)
    settings = settings_of(steps=4, learning_rate=1e-3, holdout=0.2, validate_every=4, checkpoint_every=2,
        preview_every=4, preview_pairs=1, preview=SamplerSpec(steps=2), gradient_checkpointing=True)  # fmt: skip
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_training(settings, dataset, base.folder, whole, FolderContext(whole))
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, stopped, StoppingContext(stopped))
    run_training(settings, dataset, base.folder, stopped, FolderContext(stopped))
    for path in sorted(whole.rglob("*")):
        if path.is_file() and path.relative_to(whole).parts[0] != "checkpoints":
            assert path.read_bytes() == (stopped / path.relative_to(whole)).read_bytes(), path.name


def test_the_rotation_is_measured_between_the_halves(base: Base, tmp_path: Path) -> None:
    """On images wide enough to have an inside; sampled with it."""
    dataset = write_pair_folder(tmp_path / "data", n=3, size=128)
    preview = SamplerSpec(steps=1, initial_noise="rotated")
    settings = settings_of(False, resolution=128, steps=1, preview_pairs=1, preview=preview)
    card = run_training(settings, dataset, base.folder, tmp_path / "out", FolderContext(tmp_path / "out"))
    rotation = np.array(card["noise_rotation"])
    assert np.allclose(rotation @ rotation.T, np.eye(4), atol=5e-6)
