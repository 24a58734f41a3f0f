"""The parts of the ``tiny`` base: stock CLIP and diffusers classes at small widths, a vocabulary, and the folder.

Builds untrained parts, writes and reads the Stable-Diffusion folder layout (METHODS 1). Training is
``cffa_core.recipes.pretrain``; using a base is the loader's business.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"

# Words that become single tokens besides those of the phantoms' captions: what one would write about an eye.
WORDS = """
a an and at in no of on the to with without one two many few large small left right eye centre side
high low quality color colour fundus photograph photo image picture retinal retina structure fluorescein angiography
angiogram bright dark pale red yellow vessel vessels artery arteries vein veins arcade arcades capillary capillaries
optic disc disk cup macula fovea macular temporal nasal superior inferior healthy normal diabetic retinopathy
haemorrhage haemorrhages hemorrhage hemorrhages exudate exudates microaneurysm microaneurysms leakage leak lesion
lesions drusen edema oedema scar early mid late phase , . : ; - ( ) 0 1 2 3 4 5 6 7 8 9
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class TinySizes:
    """Widths of the base. Latents are (B, 4, H/8, W/8); the U-Net has no attention at its top level."""

    vae_channels: tuple[int, int, int, int] = (16, 48, 96, 128)
    unet_channels: tuple[int, int, int] = (64, 112, 160)
    text_width: int = 128
    text_layers: int = 4
    groups: int = 8
    heads: int = 4
    sample_size: int = 64


MICRO = TinySizes((8, 8, 8, 8), (8, 16, 16), 16, 1, 4, 2, 8)


@dataclass
class TinyParts:
    """The five parts of a base, as a Stable Diffusion pipeline names them."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL
    unet: UNet2DConditionModel
    scheduler: DDIMScheduler


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes of GPT-2's byte-level BPE (Radford et al. 2019), in CLIP's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(others))]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) that make each of the ASCII ``words`` one token; most frequent first."""
    pieces = [(*word[:-1], word[-1] + "</w>") for word in sorted(set(words))]
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for piece in pieces for pair in pairwise(piece))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merged(piece, best) for piece in pieces]


def _merged(piece: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for symbol in piece:
        if out and (out[-1], symbol) == pair and not out[-1].endswith("</w>"):
            out[-1] += symbol
        else:
            out.append(symbol)
    return tuple(out)


def build_tokenizer(folder: Path, words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """Write ``vocab.json`` and ``merges.txt`` into ``folder`` and return the tokenizer; any text tokenises (bytes)."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = _byte_symbols()
    merges = learn_merges(words)
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def build_vae(sizes: TinySizes) -> AutoencoderKL:
    """Untrained AutoencoderKL: 8x smaller latents with 4 channels, no attention (it would dominate at 64x64)."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=sizes.vae_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=sizes.groups,
        sample_size=8 * sizes.sample_size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def build_unet(sizes: TinySizes) -> UNet2DConditionModel:
    """Untrained U-Net; cross-attention at 1/2 and 1/4 of the latent size (32x32 and 16x16 for 512 px)."""
    return UNet2DConditionModel(
        sample_size=sizes.sample_size,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=sizes.unet_channels,
        layers_per_block=1,
        norm_num_groups=sizes.groups,
        cross_attention_dim=sizes.text_width,
        attention_head_dim=sizes.heads,
    )


def build_text_encoder(sizes: TinySizes, tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Untrained CLIP text encoder for ``tokenizer``; output (B, 77, text_width)."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=sizes.text_width,
            intermediate_size=4 * sizes.text_width,
            projection_dim=sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.heads,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's kind of schedule (1000 steps, scaled_linear, epsilon), but up to 0.02 instead of 0.012.

    At 0.012 the largest structures of a 64x64 latent (aperture, illumination) still stand out of the noise at the last
    step, so that sampling, which starts from noise alone, drew pictures without them.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_parts(sizes: TinySizes, seed: int, tokenizer_folder: Path) -> TinyParts:
    """All five parts, untrained, initialised from ``seed``; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer(tokenizer_folder)
        text_encoder = build_text_encoder(sizes, tokenizer)
        return TinyParts(tokenizer, text_encoder, build_vae(sizes), build_unet(sizes), build_scheduler())


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Rewrite the VAE's 1x1 convolutions so that each latent channel has mean 0 and standard deviation 1.

    ``mean`` and ``std`` (4,) are the channels' statistics before the call. Exact: decode(encode(x)) is unchanged. With
    it a stock pipeline needs neither a shift nor a scaling factor.
    """
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = mean.numel()
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def export_tiny(folder: Path, parts: TinyParts, card: str) -> None:
    """Write ``parts`` as a Stable-Diffusion folder in fp16 safetensors with ``card`` as its README.md.

    The parts stay as they are. Files have the stock names, so diffusers and transformers load the folder as it is.
    """
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    build_tokenizer(folder / "tokenizer")
    for name in ("tokenizer", "scheduler", "text_encoder", "vae", "unet"):
        part = getattr(parts, name)
        _stored(part).save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    for name in ("feature_extractor", "image_encoder", "safety_checker"):
        index[name] = [None, None]
    index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    # transformers loads the dtype that the config names; the weights' fp16 is storage only.
    _edit_json(folder / "text_encoder" / "config.json", dtype="float32")
    for name in ("vae", "unet"):
        _edit_json(folder / name / "config.json", _name_or_path=None)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _stored(part: Any) -> Any:
    """``part`` itself, or for a network a copy with its parameters in fp16."""
    if not isinstance(part, torch.nn.Module):
        return part
    half = copy.deepcopy(part).cpu()
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.float16, memory_format=torch.contiguous_format)
    return half


def _edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk; None removes the key."""
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    content = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def parameter_count(module: torch.nn.Module) -> int:
    """Number of parameters of ``module``."""
    return sum(parameter.numel() for parameter in module.parameters())
