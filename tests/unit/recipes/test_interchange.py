"""Model folders in and out: stock diffusers draws our images from what is exported, and imports give the model back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from cffa_core.diffusion.rotation import BAND_EDGES, DECIMALS
from cffa_core.diffusion.sampling import build_scheduler, draw_noise
from cffa_core.errors import Conflict, CorruptArtifact, InvalidSpec, ModelUnavailable
from cffa_core.jobs.spec import LoraSpec, Method, SamplerSpec, Scheduler, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import PairMethod
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.methods.registry import METHODS, load_method
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.interchange import export_lora, export_merged, import_lora

SEED = 77
# Ours is one forward of two rows, the pipeline one of one row: float32 sums in another order, nothing else.
LATENT_TOLERANCE = 1e-4


def trained(base: Base, **options: Any) -> PairMethod:
    """A model whose LoRAs are not zero and differ, as after training; alpha is not the rank."""
    fields: dict[str, Any] = {"base": "micro", "resolution": 64, "lora": LoraSpec(rank=4, alpha=6.0)} | options
    settings = TrainSettings(**fields)
    model = METHODS[settings.method](base, settings, step=7)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def saved(model: PairMethod, folder: Path) -> Path:
    model.save(folder, dataset_digest="d", validation=None)
    return folder


def stock(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, feature_extractor=None, requires_safety_checker=False, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def drawn(
    pipeline: StableDiffusionPipeline, prompt: str, base: Base, sampler: SamplerSpec, z0: torch.Tensor | None = None
) -> torch.Tensor:
    """Final latents ``(1, 4, 8, 8)`` of a stock pipeline that starts where our pair ``SEED`` starts, or at ``z0``."""
    pipeline.scheduler = build_scheduler(sampler.scheduler, base.scheduler_config, sampler.steps)
    if z0 is None:
        z0 = draw_noise([SEED], (4, 8, 8), ["cf"], "shared", None, "z0")
    made = pipeline(
        prompt,
        latents=z0.clone(),
        height=8 * z0.shape[-2],
        width=8 * z0.shape[-1],
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        output_type="latent",
    )
    latents: torch.Tensor = made.images
    return latents


@pytest.mark.parametrize(
    ("targets", "scheduler", "guidance"),
    [
        (("to_q", "to_k", "to_v"), Scheduler.DDIM, 1.0),
        (("to_q", "to_k", "to_v", "to_out.0"), Scheduler.DPM, 3.0),
    ],
)
def test_a_stock_pipeline_draws_our_image(
    base: Base, tmp_path: Path, targets: Any, scheduler: Scheduler, guidance: float
) -> None:
    model = trained(base, lora=LoraSpec(rank=4, alpha=6.0, targets=targets))
    report = export_lora(saved(model, tmp_path / "model"), tmp_path / "out")
    assert sorted(report["files"]) == ["cf", "fa"]
    sampler = SamplerSpec(steps=4, scheduler=scheduler, guidance_scale=guidance)
    ours = PairSampler(model, sampler, 64, batch_size=1).latents([SEED])
    prompts = {"cf": model.settings.cf_prompt, "fa": model.settings.fa_prompt}
    for row, modality in enumerate(("cf", "fa")):
        pipeline = stock(base.folder)
        plain = drawn(pipeline, prompts[modality], base, sampler)[0]
        pipeline.load_lora_weights(tmp_path / "out" / modality)
        theirs = drawn(pipeline, prompts[modality], base, sampler)[0]
        scale = theirs.abs().max()
        assert (ours[row] - theirs).abs().max() / scale < LATENT_TOLERANCE
        # What a wrong alpha, no LoRA or the other modality's would give is farther away by orders of magnitude.
        assert (ours[row] - plain).abs().max() / scale > 100 * LATENT_TOLERANCE
        pipeline.set_adapters(pipeline.get_active_adapters(), 4 / 6)
        wrong = drawn(pipeline, prompts[modality], base, sampler)[0]
        assert (ours[row] - wrong).abs().max() / scale > 100 * LATENT_TOLERANCE
    assert (ours[0] - ours[1]).abs().max() > 100 * LATENT_TOLERANCE


def test_how_far_the_lora_of_shared_attention_goes(base: Base, tmp_path: Path) -> None:
    """The CF is a stock pipeline's, the FA is not: the README says so."""
    model = trained(base, method=Method.SHARED_ATTENTION)
    report = export_lora(saved(model, tmp_path / "model"), tmp_path / "out")
    assert list(report["files"]) == ["pair"]
    assert "but not its FA" in (tmp_path / "out" / "README.md").read_text()
    ours = PairSampler(model, SamplerSpec(steps=4), 64, batch_size=1).latents([SEED])
    pipeline = stock(base.folder)
    pipeline.load_lora_weights(tmp_path / "out" / "pair")
    for row, prompt in enumerate((model.settings.cf_prompt, model.settings.fa_prompt)):
        theirs = drawn(pipeline, prompt, base, SamplerSpec(steps=4))[0]
        assert ((ours[row] - theirs).abs().max() / theirs.abs().max() < LATENT_TOLERANCE) == (row == 0)


def test_the_lora_of_side_by_side_draws_the_canvas(base: Base, tmp_path: Path) -> None:
    model = trained(base, method=Method.SIDE_BY_SIDE, cf_prompt="a", fa_prompt="b")
    export_merged(saved(model, tmp_path / "model"), tmp_path / "out", base=base.folder)
    readme = (tmp_path / "out" / "pair" / "README.md").read_text()
    prompt = model.prompts("a", "b")["pair"]
    assert f"Prompt of the canvas: {prompt}\n" in readme
    sampler = SamplerSpec(steps=4, cf_prompt="a", fa_prompt="b")
    ours = PairSampler(model, sampler, 64, batch_size=1).latents([SEED])
    z0 = model.join(draw_noise([SEED], model.noise_shape(64), ["cf", "fa"], "independent", None, "z0"))
    theirs = drawn(stock(tmp_path / "out" / "pair"), prompt, base, sampler, z0)
    assert theirs.shape == ours.shape == (1, 4, 8, 8)
    assert (ours - theirs).abs().max() / theirs.abs().max() < LATENT_TOLERANCE


def test_a_controlnet_model_is_more_than_its_loras(base: Base, tmp_path: Path) -> None:
    folder = saved(trained(base, method=Method.CONTROLNET), tmp_path / "model")
    assert sorted(export_lora(folder, tmp_path / "out")["files"]) == ["cf", "fa"]
    assert "ControlNets of this model are not part" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ModelUnavailable, match="cannot be merged"):
        export_merged(folder, tmp_path / "merged", base=base.folder)


def test_merged_folders_are_bases_like_any_other(base: Base, tmp_path: Path) -> None:
    model = trained(base)
    report = export_merged(saved(model, tmp_path / "model"), tmp_path / "out", base=base.folder)
    assert report["folders"] == {"cf": "cf", "fa": "fa"}
    sampler = SamplerSpec(steps=4)
    expected = PairSampler(model, sampler, 64, batch_size=1)
    latents, pair = expected.latents([SEED]), expected.draw([0], [SEED])[0]
    for row, modality in enumerate(("cf", "fa")):
        folder = tmp_path / "out" / modality
        prompt = model.settings.cf_prompt if modality == "cf" else model.settings.fa_prompt
        theirs = drawn(stock(folder), prompt, base, sampler)[0]
        assert (latents[row] - theirs).abs().max() / theirs.abs().max() < LATENT_TOLERANCE
        # Our own loader, with LoRAs that are still zero: the fused base alone makes the image.
        fresh = DualUnet(load_base(folder), TrainSettings(resolution=64))
        found = PairSampler(fresh, sampler, 64, batch_size=1).draw([0], [SEED])[0]
        apart = np.abs(getattr(found, modality).astype(int) - getattr(pair, modality).astype(int))
        assert apart.max() <= 1
        assert base.digest != fresh.base.digest


def test_an_export_comes_back_as_the_same_model(base: Base, tmp_path: Path) -> None:
    model = trained(base)
    export_lora(saved(model, tmp_path / "model"), tmp_path / "out")
    card = import_lora(
        cf=tmp_path / "out" / "cf", fa=tmp_path / "out" / "fa", base=base.folder, out=tmp_path / "back", fa_prompt="fa"
    )
    assert card["settings"]["lora"] == model.settings.lora.model_dump(mode="json")
    assert (card["settings"]["resolution"], card["settings"]["fa_prompt"], card["step"]) == (64, "fa", 0)
    assert set(card["imported"]) == {"cf", "fa"}
    assert json.loads((tmp_path / "back" / "model.json").read_text()) == card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model", "out"]
    found = load_method(tmp_path / "back", base)
    for m in ("cf", "fa"):
        name = f"lora_{m}.safetensors"
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    ours = PairSampler(model, SamplerSpec(steps=2), 64, batch_size=1).draw([0], [SEED])[0]
    theirs = PairSampler(found, SamplerSpec(steps=2), 64, batch_size=1).draw([0], [SEED])[0]
    assert np.array_equal(ours.cf, theirs.cf) and np.array_equal(ours.fa, theirs.fa)


def test_the_card_carries_what_no_lora_file_can(base: Base, tmp_path: Path) -> None:
    """The rotations of the noise decide what a pair is: without the card the FA would start elsewhere."""
    model = trained(base, cf_prompt="a", fa_prompt="b", resolution=72)
    model.noise_rotation = np.round(np.linalg.qr(np.random.default_rng(3).standard_normal((4, 4)))[0], DECIMALS)
    model.band_rotations = np.stack([np.eye(4), np.eye(4)[::-1]] * 8)[: len(BAND_EDGES) + 1]
    export_lora(saved(model, tmp_path / "model"), tmp_path / "out")
    files: dict[str, Any] = {"cf": tmp_path / "out" / "cf", "fa": tmp_path / "out" / "fa", "base": base.folder}
    card = import_lora(**files, out=tmp_path / "back", card=tmp_path / "out" / "card.json", fa_prompt="c")
    settings = card["settings"]
    assert (settings["cf_prompt"], settings["fa_prompt"], settings["resolution"]) == ("a", "c", 72)
    found = load_method(tmp_path / "back", base)
    assert np.array_equal(found.noise_rotation, model.noise_rotation)
    assert np.array_equal(found.band_rotations, model.band_rotations)
    stored = json.loads((tmp_path / "out" / "card.json").read_text())
    for change in ({"noise_rotation": [[2.0] * 4] * 4}, {"band_rotations": np.eye(4).tolist()}, {"settings": {}}):
        (tmp_path / "bad.json").write_text(json.dumps(stored | change))
        with pytest.raises(CorruptArtifact, match=r"not the card\.json"):
            import_lora(**files, out=tmp_path / "bad", card=tmp_path / "bad.json")
    (tmp_path / "other.json").write_text(json.dumps(stored | {"base": {"name": "other", "digest": "00"}}))
    with pytest.raises(ModelUnavailable, match="on base 'other'"):
        import_lora(**files, out=tmp_path / "bad", card=tmp_path / "other.json")
    assert not (tmp_path / "bad").exists()


def test_one_lora_alone(base: Base, tmp_path: Path) -> None:
    folder = saved(trained(base, modalities=("fa",)), tmp_path / "run" / "best_checkpoint")
    export_lora(folder.parent, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "card.json", "fa"]
    assert "alpha 6" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(ModelUnavailable, match="no LoRA 'cf'; it has fa"):
        export_lora(folder, tmp_path / "other", only="cf")
    with pytest.raises(ModelUnavailable, match="one for FA") as caught:
        import_lora(cf=tmp_path / "out" / "fa", fa=None, base=base.folder, out=tmp_path / "back")
    assert [(problem.pointer, problem.code) for problem in caught.value.problems] == [("/fa", "missing_modality")]
    assert not (tmp_path / "other").exists() and not (tmp_path / "back").exists()


def test_the_two_loras_must_agree(base: Base, tmp_path: Path) -> None:
    for rank, name in ((4, "a"), (2, "b")):
        export_lora(
            saved(trained(base, lora=LoraSpec(rank=rank, alpha=4.0)), tmp_path / f"model-{name}"), tmp_path / name
        )
    with pytest.raises(ModelUnavailable, match="differ in rank") as caught:
        import_lora(cf=tmp_path / "a" / "cf", fa=tmp_path / "b" / "fa", base=base.folder, out=tmp_path / "back")
    assert caught.value.problems[0].message == "CF has rank 4, FA 2"
    with pytest.raises(InvalidSpec, match="these settings") as wrong:
        import_lora(
            cf=tmp_path / "a" / "cf", fa=tmp_path / "a" / "fa", base=base.folder, out=tmp_path / "back", resolution=65
        )
    assert wrong.value.problems[0].pointer == "/resolution"
    assert not (tmp_path / "back").exists()


def test_bad_model_folders_leave_nothing(base: Base, tmp_path: Path) -> None:
    folder = saved(trained(base), tmp_path / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(Conflict, match="nothing is written over"):
        export_lora(folder, tmp_path / "full")
    with pytest.raises(Conflict):
        export_merged(folder, tmp_path / "full", base=base.folder)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    with pytest.raises(ModelUnavailable, match="--base"):
        export_merged(folder, tmp_path / "out", base="tiny")
    stored = load_file(folder / "lora_cf.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, folder / "lora_cf.safetensors")
    with pytest.raises(CorruptArtifact, match="lora_cf"):
        export_lora(folder, tmp_path / "out")
    with pytest.raises(ModelUnavailable, match=r"model\.json"):
        export_lora(tmp_path, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "model"]
