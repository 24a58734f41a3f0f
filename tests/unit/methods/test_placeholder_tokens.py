"""Placeholder tokens: prompts, embeddings, union sampling, and the losses against the unmasked ones."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from cffa_core import rng
from cffa_core.attention.processors import capturing
from cffa_core.attention.store import AttentionStore
from cffa_core.data.pairs import Pair
from cffa_core.data.token_masks import masks_to_load, require_masks, token_mask
from cffa_core.diffusion.masked_losses import attention_loss
from cffa_core.errors import CorruptArtifact, InvalidDataset, InvalidSpec
from cffa_core.jobs.spec import LoraSpec, TokenSpec, TokensSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.masked_attention import draw_subset, nearest_side
from cffa_core.methods.placeholder_tokens import PlaceholderTokens
from cffa_core.models.base import Base

NAMES = ("disc", "lesion", "vessel")


def spec_of(**options: Any) -> TokensSpec:
    return TokensSpec(**({"tokens": list(NAMES)} | options))


def model_of(base: Base, **options: Any) -> DualUnet:
    return DualUnet(
        base,
        TrainSettings(
            lora=LoraSpec(rank=2), resolution=64, cf_prompt="a CF", fa_prompt="an FA", tokens=spec_of(**options)
        ),
    )


def pair_of(**masks: torch.Tensor) -> Pair:
    valid = torch.ones(1, 64, 64, dtype=torch.bool)
    return Pair("p", "e", torch.zeros(3, 64, 64), torch.zeros(1, 64, 64), valid, valid, masks)


def marked(*box: int) -> torch.Tensor:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    top, bottom, left, right = box
    mask[top:bottom, left:right] = True
    return mask


# --- tokens and prompts -----------------------------------------------------------------------------------------------


def test_a_token_is_one_word_and_the_base_does_not_know_it(base: Base) -> None:
    tokens = PlaceholderTokens(base, spec_of())
    ids = tokens.base.tokenizer("a <disc> and <vessel>").input_ids
    first = len(base.tokenizer)
    assert [one for one in ids if one >= first] == [first, first + 2]
    assert len(base.tokenizer) == first and "<disc>" not in base.tokenizer.get_vocab()
    assert tokens.positions("a <disc> and <vessel>") == {"disc": ids.index(first), "vessel": ids.index(first + 2)}
    with pytest.raises(InvalidSpec, match="already"):
        PlaceholderTokens(tokens.base, spec_of())


def test_other_prompts_are_encoded_bit_for_bit_as_before_whatever_the_tokens_learn(base: Base) -> None:
    tokens = PlaceholderTokens(base, spec_of(train_text_encoder=False))
    prompts = ["a CF", "disc and lesion", ""]
    table = base.text_encoder.get_input_embeddings().weight.detach().clone()
    optimizer = torch.optim.AdamW([tokens.embedding.rows], lr=0.1, weight_decay=1e-2)
    before = tokens.base.encode_prompts(["a <disc>"])
    for _ in range(3):
        tokens.base.encode_prompts_open(["a <disc> and <lesion>"]).square().sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(base.text_encoder.get_input_embeddings().weight, table)
    assert torch.equal(tokens.base.encode_prompts(prompts), base.encode_prompts(prompts))
    assert not torch.equal(tokens.base.encode_prompts(["a <disc>"]), before)


def test_a_token_begins_as_its_word_or_as_others(base: Base) -> None:
    spec = spec_of(tokens=["disc", {"name": "bright_spot", "initial": "disc"}, "vein_1"])
    tokens = PlaceholderTokens(base, spec)
    table = base.text_encoder.get_input_embeddings().weight
    ids = base.tokenizer("disc", add_special_tokens=False).input_ids
    assert torch.equal(tokens.embedding.rows[0], table[ids].mean(0))
    assert torch.equal(tokens.embedding.rows[1], tokens.embedding.rows[0])
    ids = base.tokenizer("vein 1", add_special_tokens=False).input_ids
    assert torch.equal(tokens.embedding.rows[2], table[ids].mean(0))


def test_prompts_name_the_tokens_that_are_asked_for(base: Base) -> None:
    tokens = PlaceholderTokens(base, spec_of())
    plain = {"cf": "a CF", "fa": "an FA"}
    assert tokens.prompts(plain, None)["cf"] == "a CF, a photo of <disc>, <lesion> and <vessel>"
    assert tokens.prompts(plain, ["vessel", "disc"])["fa"] == "an FA, a photo of <vessel> and <disc>"
    assert tokens.prompts(plain, ["lesion"])["cf"] == "a CF, a photo of <lesion>"
    assert tokens.prompts(plain, ()) == plain
    own = {"cf": "only <lesion>", "fa": "an FA"}
    assert tokens.prompts(own, None) == {"cf": "only <lesion>", "fa": "an FA, a photo of <disc>, <lesion> and <vessel>"}
    other = PlaceholderTokens(base, spec_of(template="a photo of {tokens}"))
    assert other.prompts(plain, ["disc", "lesion"])["cf"] == "a photo of <disc> and <lesion>"
    for asked, prompt in ((["cup"], "a CF"), (None, "a <cup>")):
        with pytest.raises(InvalidSpec) as caught:
            tokens.prompts({"cf": prompt}, asked)
        assert caught.value.problems[0].pointer == "/tokens"
        assert "cup; it has disc, lesion, vessel" in caught.value.message


def test_weights_go_out_and_come_back(base: Base, tmp_path: Path) -> None:
    first, second = PlaceholderTokens(base, spec_of()), PlaceholderTokens(base, spec_of())
    with torch.no_grad():
        for number, (_, weight) in enumerate(first.named_parameters()):
            weight.add_(0.01 * (number + 1))
    first.write(tmp_path, with_text=True)
    second.read(tmp_path, with_text=True)
    prompts = ["a <disc> and <vessel>", "nothing of the kind"]
    assert torch.equal(first.base.encode_prompts(prompts), second.base.encode_prompts(prompts))
    assert not torch.equal(second.base.encode_prompts(prompts[1:]), base.encode_prompts(prompts[1:]))
    with pytest.raises(CorruptArtifact, match=r"tokens\.safetensors does not fit"):
        PlaceholderTokens(base, spec_of(tokens=["disc", "cup"])).read(tmp_path, with_text=False)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_lesion_is_the_union_of_the_findings_unless_it_has_a_mask_of_its_own() -> None:
    found = {"haemorrhage": marked(0, 8, 0, 8), "leakage": marked(8, 16, 0, 8), "vessel": marked(0, 64, 0, 4)}
    lesion = TokenSpec(name="lesion")
    union = token_mask(pair_of(**found), lesion)
    assert union is not None and torch.equal(union, marked(0, 16, 0, 8))
    own = token_mask(pair_of(**found, lesion=marked(40, 50, 40, 50)), lesion)
    assert own is not None and torch.equal(own, marked(40, 50, 40, 50))
    named = token_mask(pair_of(**found), TokenSpec(name="red", masks=("haemorrhage", "vessel")))
    assert named is not None and torch.equal(named, found["haemorrhage"] | found["vessel"])
    assert token_mask(pair_of(**found), TokenSpec(name="disc")) is None
    spec = spec_of(tokens=["disc", "lesion", {"name": "vessel", "source": "frangi"}])
    findings = ("exudate", "haemorrhage", "leakage", "microaneurysm")
    assert masks_to_load(spec) == tuple(sorted(("disc", *findings, "lesion", "vessel")))
    assert masks_to_load(None) == ("vessel",)


def test_tokens_without_any_mask_are_named(base: Base) -> None:
    pairs = [pair_of(disc=marked(0, 0, 0, 0), vessel=marked(0, 9, 0, 9)), pair_of(disc=marked(0, 0, 0, 0))]
    with pytest.raises(InvalidDataset) as caught:
        require_masks(pairs, spec_of())
    assert [(p.pointer, p.code) for p in caught.value.problems] == [
        ("/tokens/tokens/0", "empty_mask"), ("/tokens/tokens/1", "missing_mask")
    ]  # fmt: skip
    require_masks(pairs, spec_of(tokens=["vessel", {"name": "tree", "source": "frangi"}]))


# --- a step -----------------------------------------------------------------------------------------------------------


def test_union_sampling_takes_every_size_alike_and_every_token_alike() -> None:
    there = torch.tensor([True, False, True, True])
    drawn = [tuple(draw_subset(there, rng.generator(1, "draw", k))) for k in range(6000)]
    sizes = Counter(len(one) for one in drawn)
    assert all(abs(sizes[size] / 6000 - 1 / 3) < 0.03 for size in (1, 2, 3)) and sum(sizes.values()) == 6000
    for size in (1, 2, 3):
        orders = Counter(one for one in drawn if len(one) == size)
        possible = set(permutations((0, 2, 3), size))
        assert set(orders) == possible
        assert all(abs(count / sizes[size] - 1 / len(possible)) < 0.05 for count in orders.values())
    assert draw_subset(torch.zeros(3, dtype=torch.bool), rng.generator(1)) == []
    assert draw_subset(there, rng.generator(5)) == draw_subset(there, rng.generator(5))


def batch_of(model: DualUnet, *pairs: Pair) -> tuple[dict[str, torch.Tensor], ...]:
    drawing = rng.generator(3)
    x0 = {b: torch.randn(len(pairs), 4, 8, 8, generator=drawing) for b in model.branches}
    valid = {b: torch.ones(len(pairs), 1, 8, 8, dtype=torch.bool) for b in model.branches}
    found = [model.structure(pair) for pair in pairs]
    return x0, valid, {name: torch.stack([one[name] for one in found]) for name in found[0]}


def test_the_losses_of_a_step_against_what_the_parts_say(base: Base) -> None:
    """One pair whose only masks are the disc's: the subset is known, so every term can be computed by other means."""
    model = model_of(base, attention_lambda=0.5, whole_share=0.0)
    x0, valid, structure = batch_of(model, pair_of(disc=marked(0, 16, 16, 40)))
    valid["fa"][..., :2, :] = False
    ((loss, terms),) = list(model.training_parts(x0, valid, {}, rng.generator("one draw"), structure))
    drawing = rng.generator("one draw")
    draw_subset(structure["cells"][0].flatten(1).any(1), drawing)
    t, noise = model.draw(x0["cf"].shape, drawing)
    text = {"cf": "a CF, a photo of <disc>", "fa": "an FA, a photo of <disc>"}
    encoded = torch.cat([model.base.encode_prompts([text[b]]) for b in ("cf", "fa")])
    x_t = torch.cat([model.schedule.add_noise(x0[b], noise[b], t[b]) for b in ("cf", "fa")])
    store = AttentionStore(places=("down", "up"), sides=(8,))
    with torch.no_grad(), capturing(model.unet, store):
        said = model.predict_noise(x_t, torch.cat([t["cf"], t["fa"]]), encoded, ["cf", "fa"])
    union = torch.zeros(8, 8)
    union[0:2, 2:5] = 1  # 16..40 px touch the cells 2, 3 and 4
    masked = ((noise["cf"][0] - said[0]) * union).square().sum() / 256
    assert terms["masked_cf"].item() == pytest.approx(masked.item(), rel=1e-5)
    assert terms["masked_fa"].item() == 0, "the FA did not see the disc"
    at = 1 + model.base.tokenizer(text["cf"], add_special_tokens=False).input_ids.index(len(base.tokenizer))
    attention = 0.0
    for row, position in ((0, at), (1, at + 1)):  # "an FA" is one letter longer
        seen = store.average("cross", ("down", "up"), 8)[row, position]
        attention += attention_loss(seen[None, None], structure["targets"][:, :1], torch.tensor([[True]])).item()
    assert terms["attn_loss"].item() == pytest.approx(attention, rel=1e-4)
    assert loss.item() == pytest.approx(masked.item() + 0.5 * attention, rel=1e-4)


def test_a_whole_step_is_the_pair_loss_with_all_tokens(base: Base) -> None:
    model = model_of(base, phase1_steps=0, whole_share=1.0)
    x0, valid, structure = batch_of(model, pair_of(disc=marked(0, 16, 0, 16), vessel=marked(0, 64, 30, 34)), pair_of())
    ((loss, terms),) = list(model.training_parts(x0, valid, {}, rng.generator(1), structure))
    drawing = rng.generator(1)
    torch.rand(1, generator=drawing)
    t, noise = model.draw(x0["cf"].shape, drawing)
    prompts = {b: [f"{said}, a photo of <disc> and <vessel>", said] for b, said in (("cf", "a CF"), ("fa", "an FA"))}
    text = {b: model.base.encode_prompts(said) for b, said in prompts.items()}
    pair_loss, _ = model.pair_loss_of(model.branches_at(x0, valid, text, t, noise))
    assert loss.item() == pytest.approx(pair_loss.item() + 1e-2 * terms["attn_loss"].item(), rel=1e-4)
    again, others = model.loss_at(x0, valid, {}, t, noise, structure)
    assert again.item() == pytest.approx(loss.item(), rel=1e-5) and set(others) == set(terms)


def test_a_pair_without_any_mask_trains_nothing_in_phase_1_and_breaks_nothing(base: Base) -> None:
    model = model_of(base)
    ((loss, terms),) = list(model.training_parts(*batch_of(model, pair_of())[:2], {}, rng.generator(1), batch_of(model, pair_of())[2]))  # fmt: skip  # noqa: E501
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and terms["attn_loss"].item() == 0
    assert model.tokens is not None and model.tokens.embedding.rows.grad is not None
    assert not model.tokens.embedding.rows.grad.any()


def test_the_prior_part_is_the_noise_loss_on_the_base_s_pictures_with_plain_prompts(base: Base) -> None:
    model = model_of(base, phase1_steps=0, whole_share=0.0, prior_weight=2.0)
    x0, valid, structure = batch_of(model, pair_of(disc=marked(0, 16, 0, 16)))
    assert model.prior == {}
    model.prior.update({b: torch.randn(1, 4, 8, 8, generator=rng.generator(b)) for b in model.branches})
    _, (loss, terms) = list(model.training_parts(x0, valid, {}, rng.generator("step"), structure))
    drawing = rng.generator("step")
    torch.rand(1, generator=drawing)
    draw_subset(torch.tensor([True, False, False]), drawing)
    model.draw(x0["cf"].shape, drawing)
    torch.randint(1, (1,), generator=drawing)
    t, noise = model.draw(x0["cf"].shape, drawing)
    expected = 0.0
    for b, prompt in (("cf", "a CF"), ("fa", "an FA")):
        x_t = model.schedule.add_noise(model.prior[b], noise[b], t[b])
        said = base.unet(x_t, t[b], base.encode_prompts([prompt])).sample  # no LoRA has learnt yet: it IS the base
        expected += (said - noise[b]).square().mean().item()
    assert terms["prior_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(2 * expected, rel=1e-4)
    assert model_of(base, prior_weight=0.0).prior is None


def test_which_side_is_compared(base: Base) -> None:
    assert nearest_side(base.unet, 8, 16) == 8, "the micro base looks at the text at its top level alone"
    assert nearest_side(base.unet, 32, 16) == 32
