"""LoRA files of other programs, read strictly.

Read are the names of diffusers (new and old), of peft and of kohya's scripts; whatever our adapters cannot represent is
refused by name, never dropped. Knows one file and one UNet at a time; fusing is ``merged_base``, model folders are
``recipes.interchange``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import nn

from cffa_core.errors import CorruptArtifact, ModelUnavailable, Problem
from cffa_core.jobs.spec import LoraSpec

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FILE_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
PEFT_CONFIG = "adapter_config.json"
ADAPTER_METADATA = "lora_adapter_metadata"  # diffusers' key in a safetensors header
TEXT_PREFIXES = ("text_encoder.", "text_encoder_2.", "lora_te")
KOHYA_PREFIX = "lora_unet_"
PREFIXES = ("base_model.model.", "unet.")
# Ending of a weight's name -> which of the two factors it is.
PARTS = {
    ".lora_A.weight": "A",
    ".lora_A.default.weight": "A",
    ".lora.down.weight": "A",
    ".lora_down.weight": "A",
    ".lora_linear_layer.down.weight": "A",
    ".lora_B.weight": "B",
    ".lora_B.default.weight": "B",
    ".lora.up.weight": "B",
    ".lora_up.weight": "B",
    ".lora_linear_layer.up.weight": "B",
    ".alpha": "alpha",
}
# diffusers before 0.22: "attn1.processor.to_q_lora.down.weight"
OLD_PROCESSOR = re.compile(r"\.processor\.(?P<target>to_q|to_k|to_v|to_out)_lora\.(?P<part>down|up)\.weight$")
SHOWN = 5


@dataclass(frozen=True)
class LoraFile:
    """One LoRA: per layer ``A (rank, in)`` and ``B (out, rank)``, float32; ``spec`` is what its file says and holds."""

    spec: LoraSpec
    layers: Mapping[str, tuple[torch.Tensor, torch.Tensor]]

    @property
    def scale(self) -> float:
        """Factor of the update: ``W + scale * B A``."""
        return self.spec.alpha / self.spec.rank


def find_lora_file(path: Path) -> Path:
    """The safetensors file at ``path``: itself, or in a folder the one that diffusers or peft writes.

    Raises ``ModelUnavailable`` if there is none, or if it is a pickle.
    """
    if path.is_dir():
        found = [path / name for name in FILE_NAMES if (path / name).is_file()]
        if len(found) != 1:
            holds = "both" if found else "neither"
            raise ModelUnavailable(f"{path} holds {holds} of {' and '.join(FILE_NAMES)}; name the LoRA file itself")
        return found[0]
    if not path.is_file():
        raise ModelUnavailable(f"there is no LoRA file at {path}")
    if path.suffix != ".safetensors":
        raise ModelUnavailable(
            f"{path.name} is not a .safetensors file; other formats may run code when they are read: convert it first"
        )
    return path


def read_lora(path: Path, unet: Any) -> LoraFile:
    """Read a LoRA of ``unet`` from a file or folder.

    Rank and alpha come from the weights, diffusers' metadata, peft's ``adapter_config.json`` or ``.alpha`` entries;
    without any alpha it is the rank, as everywhere. Raises ``CorruptArtifact`` for a file that is no safetensors file
    or holds NaN, ``ModelUnavailable`` with a problem for everything that does not fit this UNet or our adapters.
    """
    file = find_lora_file(path)
    stored, header = _load(file)
    said = _said(file, header)
    problems: list[Problem] = []
    layers, alphas = _by_layer(file.name, stored, unet, problems)
    targets = tuple(t for t in TARGETS if any(layer.endswith(f".{t}") for layer in layers))
    problems += _misfits(file.name, layers, targets, unet)
    spec = None if problems else _spec(file.name, layers, alphas, said, targets, problems)
    if problems or spec is None:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ModelUnavailable(
            f"{file.name} cannot be used as a LoRA of this base: "
            + "; ".join(dict.fromkeys(problem.message for problem in problems[:SHOWN]))
            + more,
            problems=tuple(problems),
        )
    broken = [layer for layer, pair in layers.items() if not all(pair[p].isfinite().all() for p in "AB")]
    if broken:
        raise CorruptArtifact(f"{file.name} holds NaN or infinity in {broken[0]}; it is of no use, train it again")
    return LoraFile(spec, {layer: (pair["A"], pair["B"]) for layer, pair in layers.items()})


def _load(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except SafetensorError as error:
        raise CorruptArtifact(f"{file.name} is not a readable safetensors file: {error}") from error


def _said(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """What the file says of itself: ``r``, ``lora_alpha``, ``use_rslora`` ... of diffusers' header or peft's config."""
    beside = file.with_name(PEFT_CONFIG)
    try:
        if ADAPTER_METADATA in header:
            said = json.loads(header[ADAPTER_METADATA])
            return {key.removeprefix("unet."): value for key, value in said.items() if not key.startswith("text_")}
        if file.name == "adapter_model.safetensors" and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (ValueError, AttributeError, OSError) as error:
        raise CorruptArtifact(f"the adapter settings of {file.name} are not readable: {error}") from error
    return {}


def _by_layer(
    file: str, stored: Mapping[str, torch.Tensor], unet: Any, problems: list[Problem]
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, float]]:
    """Sort the weights by layer of ``unet``; names that mean nothing here become problems."""
    flat = {name.replace(".", "_"): name for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    alphas: dict[str, float] = {}
    for name, tensor in sorted(stored.items()):
        if name.startswith(TEXT_PREFIXES):
            message = f"{name} changes the text encoder; a pair model keeps its base's: train the LoRA on the UNet only"
            problems.append(Problem(f"{file}:{name}", "unsupported", message))
            continue
        layer, part = _place(name, flat)
        if part is None:
            message = f"{name} is no plain low-rank weight (LoRA A, B or alpha)"
            problems.append(Problem(f"{file}:{name}", "unsupported", message))
        elif part == "alpha":
            alphas[layer] = float(tensor.float().mean())
        else:
            layers.setdefault(layer, {})[part] = tensor.float()
    return layers, alphas


def _place(name: str, flat: Mapping[str, str]) -> tuple[str, str | None]:
    """Layer and part (``A``, ``B``, ``alpha``; None if neither) that a stored name stands for."""
    if name.startswith(KOHYA_PREFIX):
        body, dot, rest = name.removeprefix(KOHYA_PREFIX).partition(".")
        return flat.get(body, body), PARTS.get(dot + rest)
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    old = OLD_PROCESSOR.search(name)
    if old:
        target = "to_out.0" if old["target"] == "to_out" else old["target"]
        return f"{name[: old.start()]}.{target}", {"down": "A", "up": "B"}[old["part"]]
    ending = next((ending for ending in PARTS if name.endswith(ending)), None)
    return (name, None) if ending is None else (name.removesuffix(ending), PARTS[ending])


def _misfits(
    file: str, layers: Mapping[str, Mapping[str, torch.Tensor]], targets: tuple[str, ...], unet: Any
) -> Iterator[Problem]:
    """What the UNet lacks, what the file lacks, and what has another size."""
    known = {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        yield Problem(file, "missing_keys", "it holds no LoRA weights of a UNet")
    for layer, pair in layers.items():
        place = f"{file}:{layer}"
        module = known.get(layer)
        if module is None:
            message = f"{layer} is no linear layer of this UNet: the LoRA was made for another architecture"
            yield Problem(place, "other_architecture", message)
        elif not layer.endswith(tuple(f".{target}" for target in TARGETS)):
            message = f"{layer} is changed; adapters here sit on {', '.join(TARGETS)} of the attentions only"
            yield Problem(place, "unsupported", message)
        elif set(pair) != {"A", "B"}:
            yield Problem(place, "missing_keys", f"{layer} has only one of the two low-rank factors")
        else:
            inside, outside = tuple(pair["A"].shape), tuple(pair["B"].shape)
            if inside[1:] != (module.in_features,) or outside[:1] != (module.out_features,):
                message = (
                    f"{layer} maps {inside[-1]} to {outside[0]} values, this UNet's {module.in_features} to "
                    f"{module.out_features}: the LoRA was made for another architecture"
                )
                yield Problem(place, "other_architecture", message)
            elif outside[1:] != inside[:1]:
                message = f"{layer}: the factors have ranks {inside[0]} and {outside[-1]}"
                yield Problem(place, "other_rank", message)
    wanted = [name for name in known if name.endswith(tuple(f".{target}" for target in targets))] if targets else []
    for name in wanted:
        if name not in layers:
            yield Problem(f"{file}:{name}", "missing_keys", f"{name} is missing, while others of its kind are there")


def _spec(
    file: str,
    layers: Mapping[str, Mapping[str, torch.Tensor]],
    alphas: Mapping[str, float],
    said: Mapping[str, Any],
    targets: tuple[str, ...],
    problems: list[Problem],
) -> LoraSpec | None:
    """Rank and alpha that hold for ALL layers; anything else is a problem."""
    ranks = {int(pair["A"].shape[0]) for pair in layers.values()}
    rank = max(ranks)
    if len(ranks) > 1:
        problems.append(Problem(file, "other_rank", f"layers have different ranks {sorted(ranks)}; one is needed"))
    elif said.get("r", rank) != rank:
        problems.append(Problem(file, "other_rank", f"it says rank {said['r']}, its weights have rank {rank}"))
    odd = [key for key in ("alpha_pattern", "rank_pattern", "use_dora", "modules_to_save") if said.get(key)]
    if odd:
        problems.append(
            Problem(file, "unsupported", f"its settings use {', '.join(odd)}, which has no counterpart here")
        )
    found = set(alphas.values())
    if len(found) > 1 or (alphas and set(alphas) != set(layers)):
        problems.append(Problem(file, "unsupported", "alpha differs between layers; one value for all is needed"))
    alpha = next(iter(found)) if found else float(said.get("lora_alpha", rank))
    if said.get("use_rslora"):
        alpha *= math.sqrt(rank)  # rank-stabilised LoRA divides by the square root of the rank (Kalajdzievski 2023)
    if problems:
        return None
    try:
        return LoraSpec.model_validate({"rank": rank, "alpha": alpha, "targets": targets})
    except ValidationError as error:
        problems.append(Problem(file, "unsupported", f"rank {rank}, alpha {alpha:g}: {error.errors()[0]['msg']}"))
        return None
