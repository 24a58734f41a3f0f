"""The pretraining recipe on a micro configuration, and the folder it shipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from cffa_core.errors import CorruptArtifact, InvalidSpec
from cffa_core.models.tiny import (
    MICRO,
    WORDS,
    TinySizes,
    build_tokenizer,
    build_vae,
    fold_latent_statistics,
    parameter_count,
)
from cffa_core.recipes.pretrain import build_tiny, sobel
from cffa_core.recipes.pretrain_config import PretrainConfig
from cffa_core.recipes.pretrain_loop import Budget, fraction, learning_rate
from cffa_core.recipes.teach import teach_words

SHIPPED = Path(__file__).parents[3] / "cffa_core" / "assets" / "tiny"
BUDGET = Budget(steps=5, batch=2, lr=1e-3)
CONFIG = PretrainConfig(
    phantoms=4, large_pairs=3, heldout=2, resolution=64, crop=32, sizes=MICRO, vae=BUDGET, refine=BUDGET,
    decoder=BUDGET, small=BUDGET, large=BUDGET, teach_words=True, text=BUDGET, words=BUDGET, every=2,
)  # fmt: skip
WEIGHTS = (
    "vae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


class Interrupted(Exception):
    """Stands for a killed process."""


@dataclass
class Killer:
    """Progress callback that stops one stage at one step."""

    stage: str
    step: int

    def __call__(self, stage: str, done: int, total: int, loss: float) -> None:
        if (stage, done) == (self.stage, self.step):
            raise Interrupted


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bit-identity needs a fixed thread count, and nets this small gain nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny(folder / "out", seed=3, work=folder / "work", config=CONFIG)
    return folder


def test_resumed_run_ends_in_the_same_weights(finished: Path, tmp_path: Path) -> None:
    for stage in ("vae", "vae-refine", "vae-decoder", "unet-small", "unet-large", "text-words", "unet-words"):
        with pytest.raises(Interrupted):
            build_tiny(
                tmp_path / "out",
                seed=3,
                work=tmp_path / "work",
                config=CONFIG,
                resume=True,
                on_progress=Killer(stage, 3),
            )
    build_tiny(tmp_path / "out", seed=3, work=tmp_path / "work", config=CONFIG, resume=True)
    for name in WEIGHTS:
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes(), name


def test_export_loads_with_stock_classes(finished: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(finished / "out")
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("an eye", height=64, width=64, num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()


def test_no_pickle_is_written(finished: Path) -> None:
    suffixes = {path.suffix for path in finished.rglob("*") if path.is_file()}
    assert suffixes <= {".safetensors", ".json", ".npy", ".txt", ".md"}


def test_card_states_how_it_was_made(finished: Path) -> None:
    card = (finished / "out" / "README.md").read_text()
    assert (
        "seed 3, 4 phantom pairs" in card
        and "| unet-large | 5 |" in card
        and "| unet-words | 5 |" in card
        and "{" not in card
    )


def test_words_are_taught_only_where_asked_for(finished: Path, tmp_path: Path) -> None:
    """The stages before are read back from the run that taught them."""
    config = replace(CONFIG, teach_words=False)
    build_tiny(tmp_path / "out", seed=3, work=finished / "work", config=config, resume=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| unet-large | 5 |" in card and "unet-words" not in card and "hardly change" in card and "{" not in card
    taught, without = (
        (place / "out" / "text_encoder" / "model.safetensors").read_bytes() for place in (finished, tmp_path)
    )
    assert taught != without


@pytest.mark.parametrize("shrink", [1, 2])
def test_latents_of_another_vae_are_refused(finished: Path, tmp_path: Path, shrink: int) -> None:
    """What a U-Net would learn from them it learns without complaint."""
    work = tmp_path / "work"
    shutil.copytree(finished / "work", work)
    latents = next(work.glob(f"latents-train-{shrink}-*.safetensors"))
    save_file({"latents": load_file(latents)["latents"] + 0.2}, latents)
    with pytest.raises(CorruptArtifact, match=r"another VAE.*remove it"):
        build_tiny(tmp_path / "out", seed=3, work=work, config=CONFIG, resume=True)


def test_a_finished_base_is_taught_its_words(finished: Path, tmp_path: Path) -> None:
    """The base's VAE and vocabulary stay; encoder and U-Net do not, and the card says what was done."""
    base, out = finished / "out", tmp_path / "out"
    facts = teach_words(base, out, seed=3, work=tmp_path / "work", config=CONFIG)
    vae, *learners = WEIGHTS
    assert (out / vae).read_bytes() == (base / vae).read_bytes()
    assert all((out / name).read_bytes() != (base / name).read_bytes() for name in learners)
    card = (out / "README.md").read_text()
    assert card.startswith((base / "README.md").read_text()) and "| unet-words | 5 |" in card
    assert facts["words"] and all(f"| {name} | {ratio:.2f} |" in card for name, ratio in facts["words"].items())
    StableDiffusionPipeline.from_pretrained(out)


def test_a_base_of_another_vocabulary_cannot_be_taught(finished: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(finished / "out", base)
    vocabulary = json.loads((base / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["quokka"] = len(vocabulary["model"]["vocab"])
    (base / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InvalidSpec, match="another vocabulary"):
        teach_words(base, tmp_path / "out", seed=3, work=tmp_path / "work", config=CONFIG)


def test_folding_standardises_latents_and_keeps_images() -> None:
    torch.manual_seed(0)
    vae = build_vae(MICRO).eval()
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.encode(image).latent_dist
        decoded = vae.decode(before.mean).sample
        mean, std = before.mean.mean((0, 2, 3)), before.mean.std((0, 2, 3))
        fold_latent_statistics(vae, mean, std)
        after = vae.encode(image).latent_dist
        assert torch.allclose(after.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
        assert torch.allclose(after.mean.std((0, 2, 3)), torch.ones(4), atol=1e-3)
        assert torch.allclose(after.std, before.std / std[None, :, None, None], rtol=1e-3)
        assert torch.allclose(vae.decode(after.mean).sample, decoded, atol=1e-4)


def test_learning_rate_follows_the_nearer_limit() -> None:
    budget = Budget(steps=1000, batch=1, lr=1.0, minutes=10)
    assert fraction(budget, 100, 540.0) == pytest.approx(0.9)
    assert fraction(budget, 900, 60.0) == pytest.approx(0.9)
    assert learning_rate(budget, 999, 0.0) < 0.03
    assert learning_rate(budget, 0, 0.0) == pytest.approx(0.01)


def test_sobel_of_a_ramp_is_its_slope() -> None:
    ramp = torch.arange(8.0).repeat(8, 1)[None, None] * 0.5
    gradients = sobel(ramp)
    assert torch.allclose(gradients[:, 0], torch.full((1, 6, 6), 0.5))
    assert torch.allclose(gradients[:, 1], torch.zeros(1, 6, 6))


def test_known_words_are_one_token_and_any_text_tokenises(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path)
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)
    text = "a zebra in the vitreous, 日本 é"
    ids = tokenizer(text).input_ids
    assert max(ids) < len(tokenizer) and tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == (
        text.replace(" ", "")
    )


def test_shipped_folder_is_small_and_of_the_documented_size() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 32 * 2**20
    unet = UNet2DConditionModel.from_pretrained(SHIPPED, subfolder="unet")
    vae = AutoencoderKL.from_pretrained(SHIPPED, subfolder="vae")
    text = CLIPTextModel.from_pretrained(SHIPPED / "text_encoder")
    assert parameter_count(unet) <= 8_000_000
    assert parameter_count(vae) <= 4_000_000
    assert parameter_count(text) <= 2_000_000
    assert unet.config.block_out_channels == list(TinySizes().unet_channels)
    assert unet.config.down_block_types[0] == "DownBlock2D"
    assert text.dtype == torch.float32
    scheduler = DDIMScheduler.from_pretrained(SHIPPED, subfolder="scheduler")
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.00085, 0.02)
    assert scheduler.config.prediction_type == "epsilon"
    assert json.loads((SHIPPED / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_shipped_tokenizer_handles_unknown_words() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(SHIPPED / "tokenizer")
    assert tokenizer.model_max_length == 77
    assert len(tokenizer("late phase with leakage").input_ids) == 6
    assert len(tokenizer("quokka ☂").input_ids) > 3
