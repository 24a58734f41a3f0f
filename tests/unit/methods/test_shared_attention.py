"""Shared attention against an explicit softmax and stock diffusers; guidance, ranges, gradients, company, resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from cffa_core import rng
from cffa_core.diffusion.sampling import build_scheduler, draw_noise
from cffa_core.errors import Cancelled, ModelUnavailable
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, Scheduler, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import PairMethod
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.methods.registry import load_method
from cffa_core.methods.shared_attention import MapPlan, SharedAttention, in_step_range, map_sources
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.train import run_training
from tests.pair_folder import write_pair_folder

ROWS = ("cf", "cf", "fa", "fa")
OFF = {"max_resolution": 1}


def settings_of(sharing: dict[str, Any] | None = None, **options: Any) -> TrainSettings:
    given = {"lora": LoraSpec(rank=4), "resolution": 64, "shared_attention": sharing}
    return TrainSettings(method="shared_attention", **(given | options))


def trained(base: Base, sharing: dict[str, Any] | None = None, **options: Any) -> SharedAttention:
    """A model whose LoRA is not zero, as after training."""
    model = SharedAttention(base, settings_of(sharing, **options))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.lora.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def inputs(rows: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 4, 8, 8, generator=generator)
    return x, torch.full((rows,), 500), torch.randn(rows, 77, 32, generator=generator)


def batch_of(model: PairMethod, size: int = 2) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(4)
    x0 = {m: torch.randn(size, 4, 8, 8, generator=generator) for m in model.branches}
    valid = {m: torch.ones(size, 1, 8, 8, dtype=torch.bool) for m in model.branches}
    return x0, valid, {m: model.base.encode_prompts([m]) for m in model.branches}


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


class Explicit:
    """METHODS 3 as it is written: every map by softmax, ``O_fa = A_cf V_fa`` by a matrix product."""

    def __init__(self, sources: Sequence[int]) -> None:
        self.sources = sources

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        query, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        maps = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        seen = torch.stack([maps[source] @ value[row] for row, source in enumerate(self.sources)])
        return attn.to_out[0](seen.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_one_attention_equals_the_explicit_softmax(base: Base) -> None:
    model = trained(base)
    attention = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    x = torch.randn(4, 16, attention.query_dim, generator=torch.Generator().manual_seed(1))
    model.lora.set_rows(["pair"] * 4)
    model.plan.set([0, 1, 0, 1], torch.device("cpu"))
    torch.testing.assert_close(attention(x), Explicit([0, 1, 0, 1])(attention, x), rtol=1e-5, atol=1e-6)
    assert not close(attention(x), Explicit([0, 1, 2, 3])(attention, x))


@torch.no_grad()
def test_the_whole_unet_equals_the_explicit_softmax(base: Base) -> None:
    model, reference = trained(base), trained(base)
    for name, module in reference.unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(Explicit([0, 1, 0, 1]))
    assert close(model.predict_noise(*inputs(), ROWS), reference.predict_noise(*inputs(), ROWS))


def layers_shown(model: SharedAttention, rows: Sequence[str] = ROWS) -> dict[str, tuple[int, int, int]]:
    """How many rows to_q, to_k and to_v of every attention are shown in one forward."""
    seen: dict[str, int] = {}
    handles = []
    for name, module in model.unet.named_modules():
        if name.endswith((".to_q", ".to_k", ".to_v")):
            handles.append(
                module.register_forward_hook(lambda _m, given, _o, name=name: seen.update({name: len(given[0])}))
            )
    with torch.no_grad():
        model.predict_noise(*inputs(len(rows)), rows)
    for handle in handles:
        handle.remove()
    found = {name: m for name, m in model.unet.named_modules() if isinstance(m, Attention)}
    return {name: (seen[f"{name}.to_q"], seen[f"{name}.to_k"], seen[f"{name}.to_v"]) for name in found}


def test_fa_has_neither_queries_nor_keys_and_cross_attention_all_rows(base: Base) -> None:
    shown = layers_shown(trained(base))
    assert len(shown) == 8
    for name, rows in shown.items():
        assert rows == ((2, 2, 4) if name.endswith("attn1") else (4, 4, 4)), name


@pytest.mark.parametrize(("side", "shared"), [(8, 4), (7, 1), (4, 1), (3, 0), (None, 4)])
def test_max_resolution_says_where(base: Base, side: int | None, shared: int) -> None:
    """At 64 px the micro UNet attends at 8x8 (three layers) and at 4x4 (one)."""
    shown = layers_shown(trained(base, {"max_resolution": side}))
    assert sum(rows[0] == 2 for name, rows in shown.items() if name.endswith("attn1")) == shared
    assert ("mid_block" in "".join(name for name, rows in shown.items() if rows[0] == 2)) == (shared > 0)


@torch.no_grad()
def test_without_sharing_it_is_the_stock_unet(base: Base) -> None:
    fresh = SharedAttention(base, settings_of(OFF))
    assert torch.equal(fresh.predict_noise(*inputs(), ROWS), base.unet(*inputs()).sample)
    assert not close(SharedAttention(base, settings_of()).predict_noise(*inputs(), ROWS), base.unet(*inputs()).sample)
    assert {type(m.processor) for n, m in fresh.unet.named_modules() if n.endswith("attn2")} == {AttnProcessor2_0}


@torch.no_grad()
def test_cf_rows_are_those_of_stock_diffusers_with_the_lora_file(base: Base, tmp_path: Path) -> None:
    """The CF looks through its own map; the reference reads our file with diffusers and merges it with peft."""
    model = trained(base)
    model.save(tmp_path / "model", dataset_digest="d", validation=None)
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["lora_pair.safetensors", "model.json"]
    fused = UNet2DConditionModel.from_pretrained(base.folder / "unet", use_safetensors=True)
    fused.load_lora_adapter(tmp_path / "model", weight_name="lora_pair.safetensors", prefix="unet")
    fused.fuse_lora()
    ours, stock = model.predict_noise(*inputs(), ROWS), fused(*inputs()).sample
    assert (ours - stock)[:2].abs().max() < 1e-4 * stock.abs().max()
    assert (ours - stock)[2:].abs().max() > 1e-2 * stock.abs().max()
    again = load_method(tmp_path / "model", base)
    assert isinstance(again, SharedAttention)
    assert torch.equal(again.predict_noise(*inputs(), ROWS), ours)


@pytest.mark.parametrize("sharing", [None, OFF])
def test_the_fa_loss_reaches_cf_s_queries_and_keys(base: Base, sharing: dict[str, Any] | None) -> None:
    model = trained(base, sharing)
    x, t, text = inputs()
    x.requires_grad_(True)
    model.predict_noise(x, t, text, ROWS)[2:].square().mean().backward()
    assert x.grad is not None
    # Through the maps, and only through them, FA's loss sees the CF.
    assert bool(x.grad[:2].any()) == (sharing is None)
    layers = [layer for n, layer in model.lora.named_parameters() if ".attn1.to_q." in n or ".attn1.to_k." in n]
    assert len(layers) == 16
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layers)


def test_the_fa_loss_alone_trains_the_queries_of_cf_rows(base: Base) -> None:
    """In a training step whose CF is not valid anywhere; to_q is shown CF rows only, so the gradient is theirs."""
    model = trained(base)
    x0, valid, text = batch_of(model)
    valid["cf"] = torch.zeros_like(valid["cf"])
    loss, terms = model.training_loss(x0, valid, text, rng.generator(1))
    loss.backward()
    assert terms["eps_cf"] == 0 < terms["eps_fa"]
    assert all(p.grad.any() for n, p in model.lora.named_parameters() if ".attn1.to_q." in n or ".attn1.to_k." in n)


@pytest.mark.parametrize(
    ("rows", "sources"),
    [
        (("cf", "fa"), [0, 0]),
        (("cf", "cf", "fa", "fa") * 2, [0, 1, 0, 1, 4, 5, 4, 5]),
        (("fa", "cf", "cf", "fa"), [1, 1, 2, 2]),
        (("cf", "fa", "fa", "cf", "cf", "fa"), [0, 0, 3, 3, 4, 4]),
    ],
)
def test_the_kth_fa_row_belongs_to_the_kth_cf_row(rows: tuple[str, ...], sources: list[int]) -> None:
    assert map_sources(rows, [True] * len(rows)) == sources
    assert map_sources(rows, [False] * len(rows)) == list(range(len(rows)))


def test_rows_without_a_partner_are_refused() -> None:
    for rows in (("cf", "fa", "fa"), ("cf", "cf"), ("cf", "fa", "pair")):
        with pytest.raises(ValueError, match="every FA row needs one CF row"):
            map_sources(rows, [True] * len(rows))


@pytest.mark.parametrize(
    ("order", "same"),
    [
        ([0, 2, 1, 3, 4, 6, 5, 7], True),
        ([2, 0, 3, 1, 6, 4, 7, 5], True),
        ([4, 1, 7, 0, 5, 6, 3, 2], False),
        ([4, 1, 6, 0, 3, 5, 2, 7], True),
        ([1, 0, 2, 3, 4, 5, 6, 7], False),
    ],
)
@torch.no_grad()
def test_any_interleaving_gives_each_row_the_same(base: Base, order: list[int], same: bool) -> None:
    """As long as the k-th FA row is that of the k-th CF row: pairs are (0, 2), (1, 3), (4, 6), (5, 7)."""
    model = trained(base)
    x, t, text = inputs(8)
    whole = model.predict_noise(x, t, text, ROWS * 2)
    found = model.predict_noise(x[order], t, text[order], [(ROWS * 2)[row] for row in order])
    assert close(found, whole[order]) == same


@torch.no_grad()
def test_guidance_shares_across_modality_and_not_across_guidance(base: Base) -> None:
    model = trained(base)
    x, t, text = inputs(8)
    apart = torch.cat([model.predict_noise(x[at], t[at], text[at], ROWS) for at in (slice(0, 4), slice(4, 8))])
    assert close(model.predict_noise(x, t, text, ROWS * 2), apart)
    in_half = model.predict_noise(x, t, text, ("cf",) * 4 + ("fa",) * 4)
    assert not close(in_half[4:], apart[4:])


@torch.no_grad()
def test_one_guided_step_is_that_of_two_forwards(base: Base) -> None:
    model, scale = trained(base), 3.0
    spec = SamplerSpec(steps=1, guidance_scale=scale, negative_prompt="blurred")
    sampler = PairSampler(model, spec, 64, 1)
    z0 = draw_noise([9], sampler.shape, ["cf", "fa"], "shared", None, "z0")
    assert torch.equal(z0[0], z0[1])
    scheduler = build_scheduler(Scheduler.DDIM, base.scheduler_config, 1)
    t = scheduler.timesteps[0]
    said = [
        model.predict_noise(z0, t, base.encode_prompts(prompts), ("cf", "fa"))
        for prompts in ((spec.cf_prompt, spec.fa_prompt), ("blurred", "blurred"))
    ]
    guided = said[1] + scale * (said[0] - said[1])
    torch.testing.assert_close(sampler.latents([9]), scheduler.step(guided, t, z0).prev_sample, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_step_range_is_decided_by_each_row_s_timestep(base: Base) -> None:
    x, _, text = inputs()
    t = torch.tensor([900, 100, 900, 100])
    full, off = (trained(base, sharing).predict_noise(x, t, text, ROWS) for sharing in (None, OFF))
    early = trained(base, {"step_range": (0.0, 0.5)}).predict_noise(x, t, text, ROWS)
    late = trained(base, {"step_range": (0.5, 1.0)}).predict_noise(x, t, text, ROWS)
    assert not close(full[2], off[2]) and not close(full[3], off[3])
    assert close(early[[0, 1, 2]], full[[0, 1, 2]]) and close(early[3], off[3])
    assert close(late[[0, 1, 3]], full[[0, 1, 3]]) and close(late[2], off[2])


@torch.no_grad()
def test_step_range_in_sampling(base: Base) -> None:
    """The timestep of a sampler is one number for all rows, with some samplers not a whole one."""
    shared = trained(base, {"step_range": (0.0, 0.5)})
    plain, full = trained(base, OFF), trained(base)
    x, _, text = inputs()
    for t in (torch.tensor(999), torch.tensor(999.0), torch.tensor(500)):
        assert torch.equal(shared.predict_noise(x, t, text, ROWS), full.predict_noise(x, t, text, ROWS))
    for t in (torch.tensor(499), torch.tensor(0.5)):
        assert torch.equal(shared.predict_noise(x, t, text, ROWS), plain.predict_noise(x, t, text, ROWS))


@pytest.mark.parametrize("cut", [0.1, 0.3, 1 / 3, 0.5, 0.7, 0.999])
def test_ranges_that_meet_share_the_scale_between_them(cut: float) -> None:
    t = torch.arange(1000)
    before, after = in_step_range(t, (0.0, cut), 1000), in_step_range(t, (cut, 1.0), 1000)
    assert [a != b for a, b in zip(before, after, strict=True)] == [True] * 1000
    assert sum(before) == pytest.approx(1000 * cut, abs=1)
    assert before[999] and after[0]
    assert in_step_range(torch.tensor([1000]), (0.0, 0.1), 1000) == [True]


def test_one_noise_and_one_timestep_for_both_images(base: Base) -> None:
    model = SharedAttention(base, settings_of())
    t, noise = model.draw(torch.Size((64, 4, 8, 8)), rng.generator(1))
    assert torch.equal(t["cf"], t["fa"]) and torch.equal(noise["cf"], noise["fa"])
    assert t["cf"].max() > 900 and t["cf"].min() < 100


@torch.no_grad()
def test_equal_rows_give_equal_images(base: Base) -> None:
    model = trained(base)
    x, t, text = inputs(2)
    cf, fa = model.predict_noise(x.repeat(2, 1, 1, 1), torch.cat([t, t]), text.repeat(2, 1, 1), ROWS).chunk(2)
    assert torch.equal(cf, fa)


def test_losses_beside_the_noise_loss_apply_where_asked_for(base: Base) -> None:
    plain, terms = trained(base).training_loss(*batch_of(trained(base)), rng.generator(1))
    assert plain.item() == pytest.approx((terms["eps_cf"] + terms["eps_fa"]).item())
    model = trained(base, loss={"hf_lambda": 0.5, "struct_lambda": 0.3})
    loss, terms = model.training_loss(*batch_of(model), rng.generator(1))
    whole = terms["eps_cf"] + terms["eps_fa"] + 0.5 * (terms["hf_cf"] + terms["hf_fa"]) + 0.3 * terms["struct"]
    assert loss.item() == pytest.approx(whole.item()) and loss > plain


def test_a_few_steps_lower_the_loss(base: Base) -> None:
    model = SharedAttention(base, settings_of())
    optimizer = torch.optim.AdamW(model.lora.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, _ = model.training_loss(*batch_of(model), rng.generator("the same draw"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_checkpointing_runs_the_same_forward_again(base: Base) -> None:
    """With rows of which some share and some do not; every layer's forward is run twice."""
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = trained(base, {"step_range": (0.0, 0.5)}, gradient_checkpointing=checkpointing)
        seen: list[int] = []
        layer = model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        layer.register_forward_hook(lambda _m, given, _o, seen=seen: seen.append(len(given[0])))
        x, _, text = inputs()
        loss = model.predict_noise(x, torch.tensor([900, 100, 900, 100]), text, ROWS).square().mean()
        loss.backward()
        gradients.append([parameter.grad for parameter in model.lora.parameters()])
        calls.append(seen)
    assert calls == [[3], [3, 3]]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_trains_the_float32_lora(base_folder: Path, base: Base, checkpointing: bool) -> None:
    model = trained(load_base(base_folder, dtype="bf16"), gradient_checkpointing=checkpointing)
    loss, _ = model.training_loss(*batch_of(model), rng.generator(1))
    reference, _ = trained(base).training_loss(*batch_of(model), rng.generator(1))
    loss.backward()
    assert loss.item() == pytest.approx(reference.item(), rel=0.05)
    assert all(p.dtype == p.grad.dtype == torch.float32 and p.grad.any() for p in model.lora.parameters())


@pytest.mark.parametrize(
    "options",
    [{}, {"scheduler": "ddpm"}, {"scheduler": "euler", "guidance_scale": 3.0}, {"initial_noise": "independent"}],
)
def test_a_pair_is_bit_identical_in_any_company(base: Base, options: dict[str, Any]) -> None:
    sampler = PairSampler(trained(base, {"step_range": (0.0, 0.6)}), SamplerSpec(steps=4, **options), 64, 4)
    assert torch.equal(sampler.latents([77, 1, 2, 3])[[0, 4]], sampler.latents([4, 5, 6, 77])[[3, 7]])


def test_the_map_ties_the_pair(base: Base) -> None:
    """Another CF text changes the FA, since its map is the CF's; in the dual UNet it does not."""
    found = []
    for model in (trained(base), DualUnet(base, TrainSettings(lora=LoraSpec(rank=4)))):
        fa = [
            PairSampler(model, SamplerSpec(steps=3, cf_prompt=prompt), 64, 1).latents([5])[1] for prompt in ("a", "b c")
        ]
        found.append(torch.equal(*fa))
    assert found == [False, True]


class StoppingContext(FolderContext):
    """A context whose job is cancelled after training step 3."""

    def progress(self, stage: str, current: int, total: int) -> None:
        if (stage, current) == ("training", 3):
            raise Cancelled("stopped by the test")


def test_resume_is_bit_identical_and_validation_shares_the_noise(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_pair_folder(tmp_path / "pairs", n=5)
    settings = settings_of({"step_range": (0.0, 0.7)}, steps=4, learning_rate=1e-3, holdout=0.2, validate_every=2,
        checkpoint_every=2, preview_every=4, preview_pairs=1, preview=SamplerSpec(steps=2), batch_size=2)  # fmt: skip
    noises: list[bool] = []
    loss_at = SharedAttention.loss_at

    def watched(self: SharedAttention, x0: Any, valid: Any, text: Any, t: Any, noise: Any, *more: Any) -> Any:
        noises.append(torch.equal(noise["cf"], noise["fa"]) and torch.equal(t["cf"], t["fa"]))
        return loss_at(self, x0, valid, text, t, noise, *more)

    monkeypatch.setattr(SharedAttention, "loss_at", watched)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    card = run_training(settings, dataset, base.folder, whole, FolderContext(whole))
    assert noises == [True] * (4 + 2 * 3)
    assert list(card["parameters"]) == ["pair"] and card["method"] == "shared_attention"
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, stopped, StoppingContext(stopped))
    run_training(settings, dataset, base.folder, stopped, FolderContext(stopped))
    for path in sorted(whole.rglob("*")):
        if path.is_file() and path.relative_to(whole).parts[0] != "checkpoints":
            assert path.read_bytes() == (stopped / path.relative_to(whole)).read_bytes(), path.name


def test_a_model_of_another_method_is_refused(base: Base, tmp_path: Path) -> None:
    trained(base).save(tmp_path / "model", dataset_digest="d", validation=None)
    with pytest.raises(ModelUnavailable, match="of method shared_attention, not dual_unet"):
        DualUnet.load(tmp_path / "model", base)


def test_a_plan_that_shares_nothing_is_plain_attention() -> None:
    plan = MapPlan()
    assert not plan.shares
    plan.set([0, 1, 1, 0], torch.device("cpu"))
    assert plan.shares and plan.computed == [0, 1] and plan.places.tolist() == [0, 1, 1, 0]
