"""Prompts projected once: the same bits as when they are projected at every step, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cffa_core.jobs.spec import LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.models.base import Base
from cffa_core.models.fixed_text import FixedText


@pytest.fixture
def model(base: Base) -> DualUnet:
    """LoRAs that are not zero, so that the two modalities see different keys."""
    model = DualUnet(base, TrainSettings(lora=LoraSpec(rank=4)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def counted(model: DualUnet) -> list[str]:
    """Names of the projections of the text that are really computed from now on."""
    calls: list[str] = []
    for name, module in model.unet.named_modules():
        if name.endswith((".attn2.to_k", ".attn2.to_v")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@torch.no_grad()
def test_forwards_are_the_same_bits_and_the_text_is_projected_once(model: DualUnet) -> None:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(4, 77, 32, generator=generator)
    rows = ["cf", "cf", "fa", "fa"]
    steps = [(torch.randn(4, 4, 8, 8, generator=generator), torch.tensor(t)) for t in (900, 500, 100)]
    plain = [model.predict_noise(x, t, text, rows) for x, t in steps]
    calls = counted(model)
    with FixedText(model.unet).during_a_run():
        fixed = [model.predict_noise(x, t, text, rows) for x, t in steps]
    assert all(torch.equal(a, b) for a, b in zip(plain, fixed, strict=True))
    assert len(calls) == len(set(calls)) > 0


@torch.no_grad()
def test_a_second_run_may_have_other_text(model: DualUnet) -> None:
    fixed = FixedText(model.unet)
    x, t = torch.zeros(2, 4, 8, 8), torch.tensor(500)
    for seed in (1, 2):
        text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(seed))
        with fixed.during_a_run():
            inside = model.predict_noise(x, t, text, ["cf", "fa"])
        assert torch.equal(inside, model.predict_noise(x, t, text, ["cf", "fa"]))


def test_the_unet_is_left_as_it_was_even_by_a_failure(model: DualUnet) -> None:
    before = {name: id(module) for name, module in model.unet.named_modules()}
    weights = len(list(model.unet.parameters()))
    with pytest.raises(RuntimeError, match="stopped"), FixedText(model.unet).during_a_run():
        assert len(list(model.unet.parameters())) < weights
        raise RuntimeError("stopped")
    assert {name: id(module) for name, module in model.unet.named_modules()} == before
    assert all(isinstance(m, nn.Module) for m in model.unet.modules())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_sampler_projects_prompts_once_per_batch(model: DualUnet, guidance: float) -> None:
    sampler = PairSampler(model, SamplerSpec(steps=3, guidance_scale=guidance), resolution=64, batch_size=2)
    calls = counted(model)
    first = sampler.latents([1, 2])
    assert len(calls) == len(set(calls)) > 0
    assert torch.equal(sampler.latents([1, 2]), first)
    assert len(calls) == 2 * len(set(calls))
