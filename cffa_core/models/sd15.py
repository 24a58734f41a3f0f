"""The architecture of Stable Diffusion 1.5, from its public configuration files; and a folder of it, at random.

For tests and benchmarks that must run the real sizes without the real weights: layout, shapes and file names are those
of `stable-diffusion-v1-5/stable-diffusion-v1-5`, the numbers are not, and neither is the vocabulary. Training and
sampling see such a folder as any other base.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    # The file says "dim" and means the number of heads (diffusers reads it so, for all bases of this age).
    "attention_head_dim": 8,
    "norm_num_groups": 32,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
# Parameters of each part.
PARAMETERS = {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
START, END = "<|startoftext|>", "<|endoftext|>"
_ONE_FILE = "20GB"


def write_sd15(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a base of SD 1.5's architecture with random weights (4.3 GB in float32, half of it in float16).

    One part is in memory at a time, so the peak is that of the UNet, 3.4 GB. The same seed gives the same weights; the
    global random state is left as it was.
    """
    makers: dict[str, Callable[[], Any]] = {
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER)),
        "vae": lambda: AutoencoderKL(**VAE),
        "unet": lambda: UNet2DConditionModel(**UNET),
    }
    write_tokenizer(folder / "tokenizer")
    for number, (part, make) in enumerate(makers.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + number)
            model = make() if dtype == torch.float32 else make().to(dtype)
        model.save_pretrained(folder / part, max_shard_size=_ONE_FILE)
        del model
    PNDMScheduler(**SCHEDULER).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return folder


def write_tokenizer(folder: Path) -> dict[str, int]:
    """Write a tokenizer of CLIP's layout and size: 256 bytes, 256 ending a word, 48,894 merges, two marks.

    CLIP's merges were counted in text; these are simply pairs of bytes, in order. Returns the vocabulary.
    """
    folder.mkdir(parents=True, exist_ok=True)
    symbols = list(_byte_symbols())
    ends = [f"{symbol}</w>" for symbol in symbols]
    wanted = int(TEXT_ENCODER["vocab_size"]) - len(symbols) - len(ends) - 2
    merges = list(islice(product(symbols, ends), wanted))
    tokens = [*symbols, *ends, *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return vocabulary


def _byte_symbols() -> Iterator[str]:
    """One printable character per byte, as byte-level BPE writes them: 188 are themselves, 68 stand above 255."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    yield from (chr(byte) for byte in printable)
    yield from (chr(256 + number) for number in range(256 - len(printable)))
