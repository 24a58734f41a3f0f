"""The architecture of SD 1.5: its published sizes, and its layout read by the code that reads every base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cffa_core.jobs.spec import CF_PROMPT, FA_PROMPT, LoraSpec
from cffa_core.models import sd15
from cffa_core.models.base import load_base
from cffa_core.models.lora import attach_dual_lora


def on_meta(part: str) -> Any:
    with torch.device("meta"):
        if part == "text_encoder":
            return CLIPTextModel(CLIPTextConfig(**sd15.TEXT_ENCODER))
        return AutoencoderKL(**sd15.VAE) if part == "vae" else UNet2DConditionModel(**sd15.UNET)


@pytest.mark.parametrize(
    ("part", "published"), [("unet", 859_520_964), ("vae", 83_653_863), ("text_encoder", 123_060_480)]
)
def test_the_parts_have_their_published_sizes(part: str, published: int) -> None:
    assert sum(p.numel() for p in on_meta(part).parameters()) == published == sd15.PARAMETERS[part]


def test_each_lora_has_the_published_size() -> None:
    unet = on_meta("unet").requires_grad_(False)
    lora = attach_dual_lora(unet, LoraSpec(), ("cf", "fa"), seed=0)
    assert [lora.parameter_count(m) for m in ("cf", "fa")] == [2_390_016, 2_390_016]


def test_the_tokenizer_has_clip_s_layout(tmp_path: Path) -> None:
    vocabulary = sd15.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(vocabulary) == len(tokenizer) == 49_408
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (49_406, 49_407, 49_407)
    for prompt in (CF_PROMPT, FA_PROMPT):
        tokens = tokenizer(prompt).input_ids
        assert (tokens[0], tokens[-1]) == (49_406, 49_407)
        assert len(tokens) <= 77 and 49_407 not in tokens[1:-1]


def test_a_folder_of_it_loads_as_any_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real function, on thin layers: the whole of it takes minutes and is benchmarks/sd15.py."""
    monkeypatch.setitem(sd15.UNET, "block_out_channels", (32, 32, 32, 32))
    monkeypatch.setitem(sd15.VAE, "block_out_channels", (32, 32, 32, 32))
    monkeypatch.setitem(sd15.TEXT_ENCODER, "num_hidden_layers", 1)
    before = torch.random.get_rng_state()
    folders = [sd15.write_sd15(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert torch.equal(before, torch.random.get_rng_state())
    bases = [load_base(folder) for folder in folders]
    assert bases[0].digest == bases[1].digest != bases[2].digest
    assert bases[0].encode_prompts([CF_PROMPT]).shape == (1, 77, 768)
    assert (bases[0].latent_shape(512), bases[0].scaling_factor) == ((4, 64, 64), 0.18215)
