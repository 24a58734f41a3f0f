"""The dual LoRA layers against independent references: the SD 1.5 count, diffusers + peft, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.spec import LoraSpec
from cffa_core.models.base import Base
from cffa_core.models.lora import DualLora, attach_dual_lora, share_weights

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


def trained_lora(base: Base, spec: LoraSpec) -> tuple[Any, DualLora]:
    """A UNet whose LoRAs are not zero, so that the two modalities differ."""
    unet = share_weights(base.unet)
    lora = attach_dual_lora(unet, spec, ("cf", "fa"), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return unet, lora


def inputs(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    return x, torch.randint(0, 1000, (rows,), generator=generator), torch.randn(rows, 77, 32, generator=generator)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [(("to_q", "to_k", "to_v"), 2_390_016), (("to_q", "to_k", "to_v", "to_out.0"), 3_188_736)],
)
def test_parameters_on_the_sd15_architecture(targets: Any, expected: int) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET).requires_grad_(False)
    lora = attach_dual_lora(unet, LoraSpec(rank=16, targets=targets), ("cf", "fa"), seed=0)
    assert lora.parameter_count("cf") == lora.parameter_count("fa") == expected
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 2 * expected


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v"), ("to_q", "to_v", "to_out.0")])
@pytest.mark.parametrize("plan", [("cf", "cf", "fa", "fa"), ("cf", "fa", "cf", "fa"), ("fa", "cf", "cf", "fa")])
@torch.no_grad()
def test_one_forward_equals_two_fused_unets(base: Base, tmp_path: Path, targets: Any, plan: tuple[str, ...]) -> None:
    unet, lora = trained_lora(base, LoraSpec(rank=4, alpha=6.0, targets=targets))
    x, t, text = inputs(4)
    lora.set_rows(plan)
    together = unet(x, t, text).sample
    for modality in ("cf", "fa"):
        (tmp_path / f"lora_{modality}.safetensors").write_bytes(lora.export(modality))
        # The reference reads our file with diffusers and merges it with peft: no code of ours takes part.
        fused = UNet2DConditionModel.from_pretrained(base.folder / "unet", use_safetensors=True)
        fused.load_lora_adapter(tmp_path, weight_name=f"lora_{modality}.safetensors", prefix="unet")
        fused.fuse_lora()
        rows = [row for row, m in enumerate(plan) if m == modality]
        alone = fused(x[rows], t[rows], text[rows]).sample
        assert (together[rows] - alone).abs().max() / alone.abs().max() < 1e-4
        wrong = fused(x, t, text).sample[[row for row, m in enumerate(plan) if m != modality]]
        assert (together[[row for row, m in enumerate(plan) if m != modality]] - wrong).abs().max() > 1e-3


@torch.no_grad()
def test_a_fresh_lora_changes_nothing(base: Base) -> None:
    unet = share_weights(base.unet)
    lora = attach_dual_lora(unet, LoraSpec(), ("cf", "fa"), seed=0)
    lora.set_rows(("cf", "fa"))
    assert torch.equal(unet(*inputs(2)).sample, base.unet(*inputs(2)).sample)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_only_the_own_modality(base: Base, checkpointing: bool) -> None:
    unet, lora = trained_lora(base, LoraSpec(rank=4))
    if checkpointing:
        unet.train().enable_gradient_checkpointing()
    lora.set_rows(("cf", "fa"))
    unet(*inputs(2)).sample[1].square().mean().backward()
    assert all(p.grad is None or not p.grad.any() for _, p in lora.named_parameters("cf"))
    assert all(p.grad is not None and p.grad.any() for _, p in lora.named_parameters("fa"))
    assert all(p.grad is None for name, p in unet.named_parameters() if "lora_" not in name)


def test_checkpointing_gives_the_same_gradients(base: Base) -> None:
    gradients = []
    for checkpointing in (False, True):
        unet, lora = trained_lora(base, LoraSpec(rank=4))
        if checkpointing:
            unet.train().enable_gradient_checkpointing()
        lora.set_rows(("cf", "fa"))
        unet(*inputs(2)).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in lora.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_base_stays_as_it_is(base: Base) -> None:
    unet, _ = trained_lora(base, LoraSpec(rank=4))
    assert not any("lora" in name for name, _ in base.unet.named_parameters())
    assert unet.conv_in.weight.data_ptr() == base.unet.conv_in.weight.data_ptr()


def test_the_start_depends_on_the_seed_alone(base: Base) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        return attach_dual_lora(share_weights(base.unet), LoraSpec(), ("cf", "fa"), seed).parameters()

    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(start(7), start(7), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(start(7), start(8), strict=True))


def test_the_start_has_peft_s_spread(base: Base) -> None:
    """Kaiming uniform with a = sqrt(5) is uniform on +-1/sqrt(fan_in): standard deviation 1/sqrt(3 fan_in)."""
    lora = attach_dual_lora(share_weights(base.unet), LoraSpec(rank=64), ("cf",), seed=0)
    for name, parameter in lora.named_parameters("cf"):
        if name.endswith("lora_A.weight"):
            assert parameter.std().item() == pytest.approx((3 * parameter.shape[1]) ** -0.5, rel=0.1)
        else:
            assert not parameter.any()


def test_rows_must_fit_the_plan(base: Base) -> None:
    unet, lora = trained_lora(base, LoraSpec(rank=4))
    lora.set_rows(("cf", "fa"))
    with pytest.raises(ValueError, match="4 rows, the row plan 2"):
        unet(*inputs(4))
    with pytest.raises(ValueError, match="no LoRA for"):
        lora.set_rows(("cf", "oct"))


def test_a_layer_may_be_shown_some_rows_alone(base: Base) -> None:
    """Each keeps its own modality, in the order given; afterwards, and after an error, the whole batch counts again."""
    unet, lora = trained_lora(base, LoraSpec(rank=4))
    lora.set_rows(("cf", "fa", "fa", "cf"))
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    x = torch.randn(4, 5, layer.base.in_features, generator=torch.Generator().manual_seed(1))
    whole, output = layer(x), unet(*inputs(4)).sample
    assert not torch.allclose(whole[0], layer(x[[1, 0, 2, 3]])[1])
    with lora.only([3, 1]):
        torch.testing.assert_close(layer(x[[3, 1]]), whole[[3, 1]])
        with pytest.raises(ValueError, match="4 rows, the row plan 2"):
            layer(x)
    with pytest.raises(ZeroDivisionError), lora.only([0]):
        _ = 1 / 0
    assert torch.equal(layer(x), whole)
    assert torch.equal(unet(*inputs(4)).sample, output)


def test_export_and_load_round_trip(base: Base, tmp_path: Path) -> None:
    _, lora = trained_lora(base, LoraSpec(rank=4))
    path = tmp_path / "lora_fa.safetensors"
    path.write_bytes(lora.export("fa"))
    other = attach_dual_lora(share_weights(base.unet), LoraSpec(rank=4), ("cf", "fa"), seed=5)
    other.load("fa", path)
    assert other.export("fa") == lora.export("fa")
    assert other.export("cf") != lora.export("cf")


def test_weights_that_do_not_fit_are_refused(base: Base, tmp_path: Path) -> None:
    _, lora = trained_lora(base, LoraSpec(rank=4))
    path = tmp_path / "lora_cf.safetensors"
    with pytest.raises(ModelUnavailable, match=r"no lora_cf\.safetensors"):
        lora.load("cf", path)
    path.write_bytes(lora.export("cf"))
    wider = attach_dual_lora(share_weights(base.unet), LoraSpec(rank=8), ("cf",), seed=0)
    with pytest.raises(CorruptArtifact, match="does not fit"):
        wider.load("cf", path)
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)
    with pytest.raises(CorruptArtifact, match="does not fit"):
        lora.load("cf", path)
    path.write_bytes(b"nonsense")
    with pytest.raises(CorruptArtifact, match="not a readable"):
        lora.load("cf", path)
