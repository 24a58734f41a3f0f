"""Loading a base: what it gives, and what it says when it cannot."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from cffa_core.errors import InvalidSpec, ModelUnavailable
from cffa_core.models.base import Base, load_base
from cffa_core.models.base_folder import base_digest
from cffa_core.models.fetch import find_base


def test_prompts_become_one_row_per_prompt(base: Base) -> None:
    rows = base.encode_prompts(["disc", "a macula", ""])
    assert rows.shape == (3, 77, 32)
    assert rows.dtype == torch.float32


def test_an_embedding_does_not_depend_on_other_prompts(base: Base) -> None:
    assert torch.equal(base.encode_prompts(["disc", "a macula"])[1:], base.encode_prompts(["a macula"]))


def test_a_prompt_over_the_limit_is_refused_not_cut(base: Base) -> None:
    base.encode_prompts(["a" * 75])
    with pytest.raises(InvalidSpec, match="78 tokens, this base takes 77"):
        base.encode_prompts(["a" * 76])


def test_moments_are_those_of_the_scaled_latent(base: Base) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, logvar = base.encode_images(images)
    raw = base.vae.encode(images).latent_dist
    assert mean.shape == logvar.shape == (2, 4, 8, 8)
    torch.testing.assert_close(mean, raw.mean * 0.18215)
    torch.testing.assert_close(torch.exp(logvar / 2), raw.std * 0.18215)


def test_decode_undoes_the_scaling(base: Base) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(base.decode(latents), base.vae.decode(latents / 0.18215).sample.clamp(-1, 1))


def test_only_the_unet_takes_the_precision_and_all_is_frozen(base_folder: Path) -> None:
    half = load_base(base_folder, dtype="bf16")
    assert half.unet.dtype == torch.bfloat16
    assert half.vae.dtype == half.text_encoder.dtype == torch.float32
    assert not any(p.requires_grad for part in (half.unet, half.vae, half.text_encoder) for p in part.parameters())


def test_latent_shape(base: Base) -> None:
    assert base.latent_shape(512) == (4, 64, 64)
    with pytest.raises(InvalidSpec, match="not divisible by 8"):
        base.latent_shape(100)


def test_a_name_in_models_dir_is_found(base_folder: Path) -> None:
    found = load_base(base_folder.name, models_dir=base_folder.parent)
    assert (found.name, found.folder) == (base_folder.name, base_folder.resolve())


def test_a_name_cannot_leave_models_dir(base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable):
        load_base(f"inner/../../{base_folder.name}", models_dir=base_folder.parent / "inner")


def test_a_bare_name_is_no_folder_of_the_current_directory(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base_folder.parent)
    assert find_base(f"./{base_folder.name}")[0].is_dir()
    with pytest.raises(ModelUnavailable, match="no base model"):
        find_base(base_folder.name)


def test_missing_parts_are_all_named(base_folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(base_folder, tmp_path / "broken")
    shutil.rmtree(broken / "scheduler")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"lacks vae, scheduler .*copy what is missing"):
        load_base(broken)


def test_a_pickled_weight_file_is_not_taken(base_folder: Path, tmp_path: Path) -> None:
    pickled = shutil.copytree(base_folder, tmp_path / "pickled")
    weights = pickled / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelUnavailable, match="lacks unet"):
        load_base(pickled)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_truncated_weight_file_is_named(base_folder: Path, tmp_path: Path, part: str) -> None:
    cut = shutil.copytree(base_folder, tmp_path / "cut")
    (weights,) = (cut / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelUnavailable, match=f"{part} of base 'cut'"):
        load_base(cut)


def test_weights_that_the_file_lacks_are_not_invented(base_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    thin = shutil.copytree(base_folder, tmp_path / "thin")
    path = thin / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["encoder.conv_in.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="conv_in"):
        load_base(thin)


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("tokenizer/vocab.json", b"{", "tokenizer/vocab.json of base 'damaged' cannot be read.*download the folder"),
        ("tokenizer/merges.txt", b"#version: 0.2\nzzz qqq\n", "the tokenizer of base 'damaged' cannot be read"),
        ("tokenizer/merges.txt", b"\xff\xfe\x00", "the tokenizer of base 'damaged' cannot be read"),
        ("vae/config.json", b"{", "vae/config.json of base 'damaged' cannot be read"),
        ("scheduler/scheduler_config.json", b"[]", "scheduler_config.json of base 'damaged' is not a JSON object"),
    ],
)
def test_damage_is_named_and_typed(base_folder: Path, tmp_path: Path, file: str, damage: bytes, says: str) -> None:
    damaged = shutil.copytree(base_folder, tmp_path / "damaged")
    (damaged / file).write_bytes(damage)
    with pytest.raises(ModelUnavailable, match=says):
        load_base(damaged)


def test_weights_of_another_architecture_are_refused(base_folder: Path, tmp_path: Path) -> None:
    wider = shutil.copytree(base_folder, tmp_path / "wider")
    path = wider / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"block_out_channels": [24, 32]}))
    with pytest.raises(ModelUnavailable, match="unet of base 'wider' cannot be loaded"):
        load_base(wider)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["unet", "vae"])
def test_weights_that_are_no_numbers_are_refused(base_folder: Path, tmp_path: Path, part: str, value: float) -> None:
    from safetensors.torch import load_file, save_file

    spoiled = shutil.copytree(base_folder, tmp_path / "spoiled")
    path = spoiled / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    name = sorted(weights)[-1]
    weights[name].view(-1)[-1] = value
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelUnavailable, match=f"{part} of base 'spoiled' holds NaN or infinity, first in {name}"):
        load_base(spoiled)


def test_a_base_that_does_not_predict_noise_is_refused(base_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base_folder, tmp_path / "velocity")
    path = other / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    with pytest.raises(ModelUnavailable, match="v_prediction"):
        load_base(other)


@pytest.mark.parametrize(
    ("ref", "says"),
    [
        ("no-such-base", "no base model"),
        ("./no-such-folder", "no base model folder"),
        ("nobody-at-all/nothing", "not in the local cache"),
    ],
)
def test_what_cannot_be_found_is_said_plainly(ref: str, says: str) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        load_base(ref)


def test_the_digest_follows_content_not_place_or_company(base_folder: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(base_folder, tmp_path / "moved")
    (moved / "README.md").write_text("a model card")
    (moved / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant that is not read")
    assert base_digest(moved) == base_digest(base_folder)
    config = moved / "unet" / "config.json"
    config.write_text(config.read_text() + "\n")
    assert base_digest(moved) != base_digest(base_folder)


def test_logvar_shift_is_the_square_of_the_scale(base: Base) -> None:
    images = torch.zeros(1, 3, 64, 64)
    shift = base.encode_images(images)[1] - base.vae.encode(images).latent_dist.logvar
    assert shift.mean().item() == pytest.approx(math.log(0.18215**2), rel=1e-5)


def test_the_key_names_of_sd15_s_files_are_understood(base: Base, base_folder: Path, tmp_path: Path) -> None:
    """SD 1.5's files are older than the classes: other names in the VAE's attention, a prefix in the text encoder."""
    from safetensors.torch import load_file, save_file

    old = shutil.copytree(base_folder, tmp_path / "old")
    vae, text = old / "vae/diffusion_pytorch_model.safetensors", old / "text_encoder/model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(vae)
    for new, was in names.items():
        weights = {k.replace(new, was) if "attentions" in k else k: v for k, v in weights.items()}
    save_file(weights, vae, {"format": "pt"})
    prefixed = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(prefixed | positions, text, {"format": "pt"})
    found = load_base(old)
    images = torch.zeros(1, 3, 64, 64)
    assert torch.equal(found.encode_prompts(["disc"]), base.encode_prompts(["disc"]))
    assert torch.equal(found.encode_images(images)[0], base.encode_images(images)[0])
