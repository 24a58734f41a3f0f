"""Captured maps are those that the UNet uses, and capturing them changes no bit of what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cffa_core.attention.processors import attention_map, capturing, cell_of
from cffa_core.attention.store import AttentionStore
from cffa_core.errors import ModelUnavailable
from cffa_core.jobs.spec import NoiseMode, SamplerSpec, Scheduler
from cffa_core.methods.method import PairMethod
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.models.base import Base

Make = Callable[..., PairMethod]
EVERYTHING: dict[str, Any] = {"kinds": ("cross", "self"), "points": ((0.1, 0.2), (0.9, 0.6))}


def latents(model: PairMethod, seeds: list[int], **sampler: Any) -> torch.Tensor:
    structure = None
    if model.takes_structure:
        images = torch.randint(0, 256, (len(seeds), 3, 64, 64), generator=torch.Generator().manual_seed(5))
        structure = dict.fromkeys(("vessels", "tile_cf", "tile_fa"), images.to(torch.uint8))
    fixed = {"steps": 3, "cf_prompt": "colour photograph", "fa_prompt": "bright vessels"}
    sampled = PairSampler(model, SamplerSpec(**(fixed | sampler)), 64, len(seeds))
    return sampled.latents(seeds, structure=structure)


@pytest.mark.parametrize("scheduler", list(Scheduler))
def test_samples_are_the_same_bits_with_capture(make: Make, scheduler: Scheduler) -> None:
    model = make()
    settings = {"scheduler": scheduler, "guidance_scale": 3.0, "negative_prompt": "blur"}
    plain = latents(model, [7, 8], **settings)
    store = AttentionStore(**EVERYTHING)
    with capturing(model.unet, store):
        captured = latents(model, [7, 8], **settings)
    assert torch.equal(plain, captured)
    assert store.numbers > 0
    assert store.step >= 2
    assert store.maps(store.layers[0].name).shape[0] == 8  # two branches, two pairs, with and without condition


@pytest.mark.parametrize("method", ["dual_unet", "shared_attention", "side_by_side", "controlnet"])
@pytest.mark.parametrize("noise", ["shared", "independent"])
def test_every_method_is_captured_and_samples_the_same_bits(make: Make, method: str, noise: NoiseMode) -> None:
    model = make(method)
    plain = latents(model, [7], initial_noise=noise)
    processors = dict(model.unet.attn_processors)
    store = AttentionStore(**EVERYTHING)
    with capturing(model.unet, store):
        captured = latents(model, [7], initial_noise=noise)
    assert torch.equal(plain, captured)
    assert model.unet.attn_processors == processors
    cross = store.average(side=None)
    assert cross.shape == (len(model.branches), 77, 8, 8)
    assert torch.allclose(cross.sum(1), torch.ones(len(model.branches), 8, 8), atol=1e-5)
    own = store.average("self", side=None)
    assert torch.allclose(own.sum((-1, -2)), torch.ones(len(model.branches), 2), atol=1e-5)


def explicit(attention: Any, shown: torch.Tensor, looked_at: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) of every head with its own loop, averaged: ``(R, N, S)``."""
    query, key = attention.to_q(shown), attention.to_k(looked_at)
    depth = query.shape[-1] // attention.heads
    maps = []
    for head in range(attention.heads):
        part = slice(head * depth, (head + 1) * depth)
        scores = torch.einsum("rnd,rsd->rns", query[..., part], key[..., part]) / math.sqrt(depth)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        maps.append(weights / weights.sum(-1, keepdim=True))
    return torch.stack(maps).mean(0)


def seen_by(model: PairMethod, name: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """What attention ``name`` is given from now on: its input, and the text of a cross-attention."""
    given: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    model.unet.get_submodule(name).register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args[0], kwargs.get("encoder_hidden_states"))), with_kwargs=True
    )
    return given


@torch.no_grad()
def test_maps_are_the_softmax_of_queries_and_keys(make: Make) -> None:
    model = make()
    place = "down_blocks.0.attentions.0.transformer_blocks.0"
    cross, own = seen_by(model, f"{place}.attn2"), seen_by(model, f"{place}.attn1")
    x, text = torch.randn(4, 4, 8, 8), torch.randn(4, 77, 32)
    points = ((0.0, 0.0), (0.4, 0.9))
    store = AttentionStore(kinds=("cross", "self"), points=points, rows=(3, 1), tokens=(5, 2))
    with capturing(model.unet, store):
        model.predict_noise(x, torch.tensor(500), text, ["cf", "cf", "fa", "fa"])
    wanted = explicit(model.unet.get_submodule(f"{place}.attn2"), cross[0][0], text)[[3, 1]][:, :, [5, 2]]
    assert torch.allclose(store.maps(f"{place}.attn2"), wanted.transpose(1, 2).unflatten(-1, (8, 8)), atol=1e-6)
    wanted = explicit(model.unet.get_submodule(f"{place}.attn1"), own[0][0], own[0][0])[[3, 1]][:, [0, 7 * 8 + 3]]
    assert torch.allclose(store.maps(f"{place}.attn1"), wanted.unflatten(-1, (8, 8)), atol=1e-6)


@torch.no_grad()
def test_the_fa_of_shared_attention_has_the_map_of_its_cf(make: Make) -> None:
    x = torch.randn(4, 4, 8, 8)
    text = torch.randn(4, 77, 32)
    found = {}
    for method in ("shared_attention", "dual_unet"):
        model = make(method)
        store = AttentionStore(**EVERYTHING)
        with capturing(model.unet, store):
            model.predict_noise(x, torch.tensor(500), text, ["cf", "fa", "cf", "fa"])
        found[method] = store.average("self", side=None), store.average(side=None)
    own, cross = found["shared_attention"]
    assert torch.equal(own[[0, 2]], own[[1, 3]])
    assert not torch.allclose(own[0], own[2])
    assert not torch.allclose(cross[0], cross[1])
    assert not torch.allclose(found["dual_unet"][0][0], found["dual_unet"][0][1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow_through_the_maps_of_a_training_step(base: Base, make: Make, checkpointing: bool) -> None:
    model = make(gradient_checkpointing=checkpointing)
    x0 = {m: torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(n)) for n, m in enumerate(("cf", "fa"))}
    valid = dict.fromkeys(("cf", "fa"), torch.ones(1, 1, 8, 8, dtype=torch.bool))
    text = {m: base.encode_prompts([m]) for m in ("cf", "fa")}
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
    given = seen_by(model, name)

    def of_the_maps(explicitly: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The attention of the FA row to token 2, and its gradients by all parameters."""
        given.clear()
        model.unet.train(checkpointing)
        store = AttentionStore(keep="last", gradients=True)
        for parameter in model.lora.parameters():
            parameter.grad = None
        with capturing(model.unet, store):
            model.training_loss(x0, valid, text, torch.Generator().manual_seed(3))
            shown, words = given[0]
            assert words is not None
            maps = explicit(model.unet.get_submodule(name), shown, words)[1, :, 2] if explicitly else None
            value = (store.maps(name)[1, 2].flatten() if maps is None else maps).square().sum()
            value.backward()
        found = [p.grad.clone() if p.grad is not None else torch.zeros(1) for p in model.lora.parameters()]
        return value.detach(), found

    value, gradients = of_the_maps(False)
    wanted_value, wanted = of_the_maps(True)
    assert torch.allclose(value, wanted_value, rtol=1e-5)
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    scale = max(float(g.abs().max()) for g in wanted)
    assert max(float((a - b).abs().max()) for a, b in zip(gradients, wanted, strict=True)) < 1e-5 * scale


def test_capture_does_not_change_the_gradients_of_training(base: Base, make: Make) -> None:
    model = make(gradient_checkpointing=True)
    model.unet.train()
    x0 = dict.fromkeys(("cf", "fa"), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    valid = dict.fromkeys(("cf", "fa"), torch.ones(2, 1, 8, 8, dtype=torch.bool))
    text = {m: base.encode_prompts([m]) for m in ("cf", "fa")}

    def gradients() -> list[torch.Tensor]:
        for parameter in model.lora.parameters():
            parameter.grad = None
        model.training_loss(x0, valid, text, torch.Generator().manual_seed(3))[0].backward()
        return [p.grad.clone() for p in model.lora.parameters() if p.grad is not None]

    plain = gradients()
    for graph in (False, True):
        store = AttentionStore(keep="last", gradients=graph)
        with capturing(model.unet, store):
            captured = gradients()
        assert store.average(side=None).requires_grad is graph
        assert all(torch.equal(a, b) for a, b in zip(plain, captured, strict=True))


@torch.no_grad()
def test_processors_come_back_when_the_run_fails(make: Make) -> None:
    model = make("shared_attention")
    before = dict(model.unet.attn_processors)
    with pytest.raises(RuntimeError, match="stopped"), capturing(model.unet, AttentionStore()):
        raise RuntimeError("stopped")
    assert model.unet.attn_processors == before
    assert not model.unet._forward_pre_hooks


@torch.no_grad()
def test_rows_that_the_batch_does_not_have_are_refused(make: Make) -> None:
    model = make()
    with capturing(model.unet, AttentionStore(rows=(0, 2))), pytest.raises(ValueError, match="the batch has 2"):
        model.predict_noise(torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 77, 32), ["cf", "fa"])


@torch.no_grad()
def test_a_processor_that_projects_otherwise_is_refused(make: Make) -> None:
    class Twice:
        def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any) -> torch.Tensor:
            attn.to_q(hidden_states)
            attn.to_q(hidden_states)
            return hidden_states

    model = make()
    model.unet.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn2").processor = Twice()
    with capturing(model.unet, AttentionStore()), pytest.raises(ModelUnavailable, match="does not project"):
        model.predict_noise(torch.zeros(2, 4, 8, 8), torch.tensor(1), torch.zeros(2, 77, 32), ["cf", "fa"])


@torch.no_grad()
def test_half_precision_queries_give_float32_maps() -> None:
    query, key = torch.randn(2, 6, 8).bfloat16(), torch.randn(2, 5, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attention_map(query, key, 2)
    assert found.dtype == torch.float32
    assert torch.equal(found, attention_map(query.float(), key.float(), 2))


def test_cells_of_points() -> None:
    assert cell_of((0.0, 0.0), (4, 8)) == 0
    assert cell_of((1.0, 1.0), (4, 8)) == 31
    assert cell_of((0.5, 0.25), (4, 8)) == 8 + 4
