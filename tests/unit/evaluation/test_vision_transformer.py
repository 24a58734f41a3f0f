"""A vision transformer from a local folder, here a tiny random one; what is not one is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from cffa_core.data.contracts import PairImages
from cffa_core.errors import ModelUnavailable
from cffa_core.evaluation.features import load_extractor

SHAPE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}


def write_dinov2(folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**SHAPE)).save_pretrained(folder)
    return folder


def pair(size: int = 56) -> PairImages:
    random = np.random.default_rng(1)
    seen = np.ones((size, size), bool)
    cf, fa = (random.integers(0, 256, shape, dtype=np.uint8) for shape in ((size, size, 3), (size, size)))
    return PairImages(cf, fa, seen, seen)


def test_the_features_are_the_class_token_of_the_normalised_image(tmp_path: Path) -> None:
    folder = write_dinov2(tmp_path / "dino")
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": mean, "image_std": std}))
    extractor = load_extractor("vit", folder=folder)
    cf, fa = extractor.pair(pair())
    pixels = torch.from_numpy(pair().cf).permute(2, 0, 1)[None].float() / 255
    normal = (pixels - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = Dinov2Model.from_pretrained(folder).eval()(normal).last_hidden_state[0, 0]
    np.testing.assert_allclose(cf, wanted.numpy(), rtol=1e-4, atol=1e-5)
    assert fa.shape == (24,)
    assert np.abs(cf - fa).max() > 1e-3
    assert extractor.name == "vit:dino"


def test_a_plain_vit_without_pooler(tmp_path: Path) -> None:
    ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False).save_pretrained(tmp_path)
    cf, fa = load_extractor("vit", folder=tmp_path).pair(pair(100))
    assert cf.shape == fa.shape == (24,)


def test_the_input_size_of_the_preprocessing_is_used_in_whole_patches(tmp_path: Path) -> None:
    folder = write_dinov2(tmp_path)
    for asked, side in ({"crop_size": {"height": 48, "width": 48}}, 42), ({"size": {"shortest_edge": 28}}, 28):
        (folder / "preprocessor_config.json").write_text(json.dumps(asked))
        extractor = load_extractor("vit", folder=folder)
        assert extractor.side == side  # type: ignore[attr-defined]
        assert np.isfinite(extractor.pair(pair(100))[0]).all()


def test_the_digest_is_that_of_the_weights(tmp_path: Path) -> None:
    folder = write_dinov2(tmp_path)
    before = load_extractor("vit", folder=folder).sha256
    assert load_extractor("vit", folder=folder).sha256 == before
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"][0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_extractor("vit", folder=folder).sha256 != before


def test_folders_that_hold_no_usable_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailable, match=r"config.json and model.safetensors"):
        load_extractor("vit", folder=tmp_path / "empty")
    CLIPTextModel(
        CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    ).save_pretrained(tmp_path / "text")
    with pytest.raises(ModelUnavailable, match="supported are"):
        load_extractor("vit", folder=tmp_path / "text")
    folder = write_dinov2(tmp_path / "part")
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match="lacks weights"):
        load_extractor("vit", folder=folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_extractor("vit", folder=folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelUnavailable, match="not a JSON object"):
        load_extractor("vit", folder=folder)
