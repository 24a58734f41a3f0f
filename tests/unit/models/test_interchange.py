"""LoRAs of other programs, read strictly, and fused UNets: diffusers, peft and kohya's names are the references."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.spec import LoraSpec
from cffa_core.models.base import Base
from cffa_core.models.interchange import LoraFile, find_lora_file, read_lora
from cffa_core.models.lora import attach_dual_lora, share_weights
from cffa_core.models.merged_base import fused_unet

SPEC = LoraSpec(rank=4, alpha=6.0, targets=("to_q", "to_v", "to_out.0"))
Weights = dict[str, torch.Tensor]


def exported(base: Base, folder: Path, spec: LoraSpec = SPEC) -> Path:
    """A LoRA that is not zero, in our own (diffusers') format."""
    lora = attach_dual_lora(share_weights(base.unet), spec, ("cf",), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    path = folder / "pytorch_lora_weights.safetensors"
    path.write_bytes(lora.export("cf"))
    return path


def rewritten(path: Path, change: Callable[[Weights], Mapping[str, torch.Tensor]], **metadata: Any) -> Path:
    """The same file with other weights; ``metadata`` becomes diffusers' header (none if empty)."""
    header = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in metadata.items()})} if metadata else None
    weights = {name: tensor.contiguous().clone() for name, tensor in change(load_file(path)).items()}
    save_file(weights, path, header)
    return path


def kohya(weights: Weights) -> Weights:
    """The names of kohya's training scripts, with alpha beside the weights."""
    found: Weights = {}
    for name, tensor in weights.items():
        layer, _, part = name.removeprefix("unet.").rpartition(".lora_")
        flat = "lora_unet_" + layer.replace(".", "_")
        found[f"{flat}.lora_{'down' if part.startswith('A') else 'up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(6.0)
    return found


def old_diffusers(weights: Weights) -> Weights:
    """The names of diffusers' first attention processors; they have no alpha."""
    found: Weights = {}
    for name, tensor in weights.items():
        layer, _, part = name.rpartition(".lora_")
        block, _, target = layer.removesuffix(".0").rpartition(".")
        found[f"{block}.processor.{target}_lora.{'down' if part.startswith('A') else 'up'}.weight"] = tensor
    return found


def same(found: LoraFile, expected: LoraFile) -> bool:
    return found.layers.keys() == expected.layers.keys() and all(
        torch.equal(a, b)
        for name, pair in expected.layers.items()
        for a, b in zip(pair, found.layers[name], strict=True)
    )


def test_our_own_file_is_read_as_written(base: Base, tmp_path: Path) -> None:
    path = exported(base, tmp_path)
    found = read_lora(tmp_path, base.unet)
    assert found.spec == SPEC and found.scale == 1.5
    stored = load_file(path)
    assert {f"unet.{name}.lora_A.weight" for name in found.layers} | {
        f"unet.{name}.lora_B.weight" for name in found.layers
    } == stored.keys()
    assert all(torch.equal(stored[f"unet.{name}.lora_B.weight"], up) for name, (_, up) in found.layers.items())


@pytest.mark.parametrize(("convert", "alpha"), [(kohya, 6.0), (old_diffusers, 4.0)])
def test_other_names_mean_the_same_weights(base: Base, tmp_path: Path, convert: Any, alpha: float) -> None:
    path = exported(base, tmp_path)
    expected = read_lora(path, base.unet)
    found = read_lora(rewritten(path, convert), base.unet)
    assert same(found, expected)
    assert found.spec == LoraSpec(rank=4, alpha=alpha, targets=SPEC.targets)


@pytest.mark.parametrize("stabilised", [False, True])
@torch.no_grad()
def test_a_folder_of_peft(base: Base, tmp_path: Path, stabilised: bool) -> None:
    """peft writes the folder and computes the reference; alpha and rank-stabilised scaling must come out alike."""
    unet = UNet2DConditionModel.from_pretrained(base.folder / "unet", use_safetensors=True)
    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "to_k"], init_lora_weights=False, use_rslora=stabilised
    )
    theirs = get_peft_model(unet, config).eval()
    theirs.save_pretrained(tmp_path)
    found = read_lora(tmp_path, base.unet)
    assert found.spec.rank == 4 and found.spec.targets == ("to_q", "to_k")
    ours = fused_unet(base.unet, found)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 800]), torch.randn(2, 77, 32)
    expected = theirs(x, t, text).sample
    assert (ours(x, t, text).sample - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
    assert (base.unet(x, t, text).sample - expected).abs().max() > 1e-3


@torch.no_grad()
def test_fusing_equals_diffusers_and_leaves_the_base_alone(base: Base, tmp_path: Path) -> None:
    path = exported(base, tmp_path)
    before = base.unet.state_dict()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    ours = fused_unet(base.unet, read_lora(path, base.unet))
    theirs = UNet2DConditionModel.from_pretrained(base.folder / "unet", use_safetensors=True)
    theirs.load_lora_adapter(tmp_path, weight_name=path.name, prefix="unet")
    theirs.fuse_lora()
    theirs.unload_lora()
    expected = theirs.state_dict()
    changed = 0
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        changed += not torch.equal(tensor, kept[name])
        assert torch.equal(base.unet.state_dict()[name], kept[name])
    assert changed == len(read_lora(path, base.unet).layers)


def without_first(weights: Weights) -> Weights:
    return dict(list(weights.items())[1:])


def without_a_layer(weights: Weights) -> Weights:
    layer = next(iter(weights)).partition(".lora_")[0]
    return {name: tensor for name, tensor in weights.items() if not name.startswith(layer)}


def wider(weights: Weights) -> Weights:
    return {n: torch.cat([t, t], dim=1) if "lora_A" in n else torch.cat([t, t]) for n, t in weights.items()}


def elsewhere(weights: Weights) -> Weights:
    return {name.replace("down_blocks.0", "down_blocks.3"): tensor for name, tensor in weights.items()}


def uneven(weights: Weights) -> Weights:
    layer = next(iter(weights)).partition(".lora_")[0]
    a, b = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    return weights | {a: weights[a][:2], b: weights[b][:, :2]}


def with_text(weights: Weights) -> Weights:
    return weights | {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}


def with_feed_forward(weights: Weights) -> Weights:
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    return weights | {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(16, 4)}


def with_dora(weights: Weights) -> Weights:
    return weights | {next(iter(weights)).partition(".lora_")[0] + ".lora_magnitude_vector": torch.ones(4)}


@pytest.mark.parametrize(
    ("change", "said", "code", "words"),
    [
        (without_first, {}, "missing_keys", "only one of the two"),
        (without_a_layer, {}, "missing_keys", "is missing, while others"),
        (lambda weights: {"x": torch.ones(1)}, {}, "missing_keys", "no LoRA weights"),
        (wider, {}, "other_architecture", "another architecture"),
        (elsewhere, {}, "other_architecture", "no linear layer of this UNet"),
        (dict, {"r": 8, "lora_alpha": 8}, "other_rank", "says rank 8, its weights have rank 4"),
        (uneven, {}, "other_rank", "different ranks"),
        (with_text, {}, "unsupported", "text encoder"),
        (with_feed_forward, {}, "unsupported", "attentions only"),
        (with_dora, {}, "unsupported", "no plain low-rank weight"),
        (dict, {"r": 4, "lora_alpha": 4, "use_dora": True}, "unsupported", "use_dora"),
        (dict, {"r": 4, "lora_alpha": -1}, "unsupported", "alpha -1"),
    ],
)
def test_what_does_not_fit_is_named(
    base: Base, tmp_path: Path, change: Any, said: dict[str, Any], code: str, words: str
) -> None:
    path = rewritten(exported(base, tmp_path), change, **said)
    with pytest.raises(ModelUnavailable, match=words) as caught:
        read_lora(path, base.unet)
    assert code in {problem.code for problem in caught.value.problems}
    assert all(problem.pointer.startswith(path.name) for problem in caught.value.problems)


def test_damage_is_told_from_misfit(base: Base, tmp_path: Path) -> None:
    path = rewritten(exported(base, tmp_path), lambda weights: {n: t * float("nan") for n, t in weights.items()})
    with pytest.raises(CorruptArtifact, match="NaN"):
        read_lora(path, base.unet)
    path.write_bytes(b"nonsense")
    with pytest.raises(CorruptArtifact, match="not a readable safetensors"):
        read_lora(path, base.unet)


def test_pickles_and_absent_files_are_refused(base: Base, tmp_path: Path) -> None:
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02")
    with pytest.raises(ModelUnavailable, match="may run code"):
        find_lora_file(tmp_path / "pytorch_lora_weights.bin")
    with pytest.raises(ModelUnavailable, match="neither of"):
        find_lora_file(tmp_path)
    with pytest.raises(ModelUnavailable, match="no LoRA file at"):
        find_lora_file(tmp_path / "absent.safetensors")
