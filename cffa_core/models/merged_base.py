"""A base with a LoRA fused in: its UNet, and the folder in Stable Diffusion's layout that holds it.

Equal to the base with the LoRA beside it, and loaded as any other base. Reading LoRA files is ``interchange``.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from cffa_core.models.base import Base, quiet
from cffa_core.models.interchange import LoraFile
from cffa_core.models.lora import share_weights


def fused_unet(unet: Any, lora: LoraFile) -> Any:
    """A UNet of its own with ``W + alpha / rank * B A`` in place of ``W``; all other weights are shared with ``unet``.

    The sum is made in float32 and stored in ``unet``'s dtype.
    """
    fused = share_weights(unet)
    with torch.no_grad():
        for name, (down, up) in lora.layers.items():
            layer = fused.get_submodule(name)
            update = lora.scale * (up.to(layer.weight.device) @ down.to(layer.weight.device))
            summed = (layer.weight.float() + update).to(layer.weight.dtype)
            layer.weight = nn.Parameter(summed, requires_grad=False)
    return fused


def write_base(folder: Path, base: Base, unet: Any, card: str) -> None:
    """Write ``base`` with ``unet`` as its UNet into the empty ``folder``, in Stable Diffusion's layout.

    Networks are written as they are in memory (text encoder and VAE float32), tokenizer and scheduler are copied.
    """
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
    networks = {"text_encoder": base.text_encoder, "vae": base.vae, "unet": unet}
    with quiet():
        for name, network in networks.items():
            network.save_pretrained(folder / name)
            index[name] = [type(network).__module__.split(".")[0], type(network).__name__]
    for name in ("tokenizer", "scheduler"):
        (folder / name).mkdir()
        for file in sorted((base.folder / name).iterdir()):
            if file.suffix in (".json", ".txt") and file.is_file():
                shutil.copyfile(file, folder / name / file.name)
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    index["scheduler"] = ["diffusers", base.scheduler_config.get("_class_name", "DDIMScheduler")]
    # diffusers looks for these parts unless the index says that there are none.
    index |= {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    index["requires_safety_checker"] = False
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
