"""Whole edits of a pair: what comes back untouched, what one mask means, what a pair depends on, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cffa_core.data.phantom import make_phantom
from cffa_core.editing.denoiser import BaseAlone, Denoiser, check_can_edit
from cffa_core.editing.editor import PairEditor, SourcePair
from cffa_core.errors import InvalidDataset, InvalidSpec
from cffa_core.jobs.edit_spec import EditSettings
from cffa_core.jobs.spec import Method, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.registry import METHODS
from cffa_core.methods.shared_attention import SharedAttention
from cffa_core.models.base import Base

SIDE = 128
EYE = make_phantom(5, SIDE, findings=frozenset())
SOURCE = SourcePair(0, "p", EYE.cf, EYE.fa)


def editor(base: Base, *edits: dict[str, Any], **fields: Any) -> PairEditor:
    given = {"count": 1, "edits": edits, "resolution": SIDE, "steps": 6, "skip": 0.2, **fields}
    return PairEditor(BaseAlone(base), EditSettings.model_validate(given))


def strong(text: str = "early phase", **fields: Any) -> dict[str, Any]:
    """An edit that is seen: the shipped base knows the phases of an angiogram."""
    return {"text": text, "strength": 20.0, "threshold": 0.95, **fields}


def differs(a: Any, b: Any, modality: str) -> bool:
    return not np.array_equal(getattr(a, modality), getattr(b, modality))


# --- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{}, {"cf_prompt": "retina", "fa_prompt": "vessels"}, {"noise": "independent"}],
    ids=["plain", "prompts of the source", "own noise"],
)
def test_without_an_edit_the_latent_comes_back_exactly(tiny: Base, fields: dict[str, Any]) -> None:
    plain = editor(tiny, **fields)
    x0 = plain.encode(SOURCE)
    back, touched = plain.latents(x0, seed=3)
    assert (back - x0).abs().max() < 5e-5  # measured: 4e-6; latents have deviation 1
    assert not touched.any()


def test_without_an_edit_the_pictures_come_back_to_the_last_bit(tiny: Base) -> None:
    edited = editor(tiny).edit(SOURCE)
    assert np.array_equal(edited.cf, SOURCE.cf)
    assert np.array_equal(edited.fa, SOURCE.fa)
    assert not edited.weight.any()
    # Although the VAE alone would not give them back: that is reported.
    assert edited.round_trip["cf"] > 1
    assert edited.round_trip["fa"] > 1


def test_outside_the_mask_every_pixel_is_the_source_s(tiny: Base) -> None:
    edited = editor(tiny, strong()).edit(SOURCE)
    outside = edited.weight == 0
    assert 0.2 < outside.mean() < 0.99
    for m in ("cf", "fa"):
        assert differs(edited, SOURCE, m)
        assert np.array_equal(getattr(edited, m)[outside], getattr(SOURCE, m)[outside])


def test_outside_the_cameras_aperture_nothing_is_drawn(tiny: Base) -> None:
    edited = editor(tiny, strong(threshold=0.0)).edit(SOURCE)
    assert (edited.weight > 0).mean() > 0.8
    dark = ~(EYE.valid_cf | EYE.valid_fa)
    assert dark.mean() > 0.03
    assert np.array_equal(edited.cf[dark], SOURCE.cf[dark])
    assert np.array_equal(edited.fa[dark], SOURCE.fa[dark])


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_mask_of_either_image_their_intersection_and_union(tiny: Base) -> None:
    # One step above t = 800, so that all modes see the same latents; a second that no edit acts at.
    def cells(mode: str) -> torch.Tensor:
        made = editor(tiny, strong(threshold=0.7, cooldown=1), mask=mode, steps=2, skip=0.0)
        assert made.solver.timesteps[0] <= 800
        return made.latents(made.encode(SOURCE), seed=3)[1]

    cf, fa = cells("cf"), cells("fa")
    assert cf.any() and fa.any() and not torch.equal(cf, fa)
    assert torch.equal(cells("intersection"), cf & fa)
    assert torch.equal(cells("union"), cf | fa)


def test_a_drawn_area_bounds_the_edit(tiny: Base) -> None:
    where = np.zeros((SIDE, SIDE), bool)
    where[40:72, 48:88] = True
    edited = editor(tiny, strong()).edit(SourcePair(0, "p", EYE.cf, EYE.fa, where))
    assert differs(edited, SOURCE, "cf")
    assert not edited.weight[~where].any()
    assert np.array_equal(edited.fa[~where], SOURCE.fa[~where])


# --- edits ------------------------------------------------------------------------------------------------------------


def test_adding_and_removing_go_opposite_ways_and_strength_counts(tiny: Base) -> None:
    where = np.ones((SIDE, SIDE), bool)  # one mask for all: only the guidance differs
    x0 = editor(tiny).encode(SOURCE)

    def change(*edits: dict[str, Any]) -> torch.Tensor:
        return editor(tiny, *edits).latents(x0, seed=3, where=where)[0] - x0

    flat = {"threshold": 0.0, "cooldown": 1}
    add, less = change(strong(**flat)), change(strong(strength=4.0, text="early phase", threshold=0.0, cooldown=1))
    remove = change(strong(direction="remove", **flat))
    assert float(torch.nn.functional.cosine_similarity(add.flatten(), remove.flatten(), dim=0)) < -0.3
    assert add.norm() > 1.5 * less.norm()
    both = change(strong(**flat), strong(direction="remove", **flat))
    assert both.abs().max() < 1e-3  # one undoes the other


def test_an_edit_begins_after_its_warmup_and_ends_at_its_cooldown(tiny: Base) -> None:
    x0 = editor(tiny).encode(SOURCE)
    never = editor(tiny, strong(warmup=4, cooldown=5)).latents(x0, seed=3)
    late = editor(tiny, strong(warmup=4)).latents(x0, seed=3)
    whole = editor(tiny, strong()).latents(x0, seed=3)
    assert torch.equal(never[0], late[0])  # five steps are taken: the fifth is the last
    assert 0 < (late[0] - x0).abs().sum() < (whole[0] - x0).abs().sum()


# --- what a pair depends on -------------------------------------------------------------------------------------------


def test_a_pair_is_the_same_whatever_was_edited_before(tiny: Base) -> None:
    other = make_phantom(6, SIDE)
    used = editor(tiny, strong(), steps=3)
    used.edit(SourcePair(4, "q", other.cf, other.fa))
    again, fresh = used.edit(SOURCE), editor(tiny, strong(), steps=3).edit(SOURCE)
    assert np.array_equal(again.cf, fresh.cf)
    assert np.array_equal(again.fa, fresh.fa)
    elsewhere = used.edit(SourcePair(1, "p", EYE.cf, EYE.fa))
    assert elsewhere.seed != fresh.seed
    assert differs(elsewhere, fresh, "cf")


def test_a_model_that_learnt_nothing_edits_as_its_base(base: Base) -> None:
    settings = EditSettings.model_validate(
        {"count": 1, "edits": [{"text": "blood"}], "resolution": 64, "steps": 3, "skip": 0.0}
    )
    eye = make_phantom(5, 64)
    source = SourcePair(0, "p", eye.cf, eye.fa)
    fresh = DualUnet(base, TrainSettings(resolution=64))
    x0 = PairEditor(fresh, settings).encode(source)

    def edited(denoiser: Denoiser) -> torch.Tensor:
        return PairEditor(denoiser, settings).latents(x0, seed=3)[0]

    before = edited(fresh)
    assert torch.equal(edited(BaseAlone(base)), before)
    with torch.no_grad():
        for name, weight in fresh.named_parameters():
            if "cf" in name:
                weight += 0.3
    after = edited(fresh)
    assert (after[0] - before[0]).abs().max() > 1e-2
    # The FA has its own LoRA, and its own mask would be as before; the one mask is joined with the CF's.
    assert (after[1] - before[1]).abs().max() < (after[0] - before[0]).abs().max()


def test_a_model_whose_fa_looks_through_the_cf_edits_too(base: Base) -> None:
    model = SharedAttention(base, TrainSettings(method=Method.SHARED_ATTENTION, resolution=64))
    eye = make_phantom(5, 64)

    def change(**fields: Any) -> torch.Tensor:
        given = {"count": 1, "resolution": 64, "steps": 4, "skip": 0.0, **fields}
        made = PairEditor(model, EditSettings.model_validate(given))
        x0 = made.encode(SourcePair(0, "p", eye.cf, eye.fa))
        return made.latents(x0, seed=3)[0] - x0

    assert change().abs().max() < 5e-5
    assert all(change(edits=[{"text": "blood"}])[row].abs().max() > 1e-2 for row in (0, 1))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_prompts_that_the_base_cannot_take(base: Base) -> None:
    small = {"resolution": 64}
    with pytest.raises(InvalidSpec, match="takes 77") as refused:
        editor(base, strong(), strong("x" * 90), **small)
    assert [problem.pointer for problem in refused.value.problems] == ["/edits/1/text"]
    with pytest.raises(InvalidSpec, match="takes 77") as refused:
        editor(base, strong("x", fa_text="x" * 90), **small)
    assert [problem.pointer for problem in refused.value.problems] == ["/edits/0/fa_text"]
    with pytest.raises(InvalidSpec, match="takes 77") as refused:
        editor(base, fa_prompt="x" * 90, **small)
    assert [(problem.pointer, problem.code) for problem in refused.value.problems] == [
        ("/fa_prompt", "prompt_too_long")
    ]
    with pytest.raises(InvalidSpec, match="write a word"):
        editor(base, strong("   "), **small)


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"fa": None}, "no_partner"),
        ({"cf": None}, "no_partner"),
        ({"cf": np.zeros((SIDE, SIDE // 2, 3), np.uint8)}, "size"),
        ({"fa": np.zeros((SIDE, SIDE), np.float32)}, "size"),
        ({"where": np.ones((SIDE // 2, SIDE), bool)}, "mask_size"),
        ({"where": np.zeros((SIDE, SIDE), bool)}, "mask_empty"),
    ],
)
def test_pairs_that_cannot_be_edited(base: Base, changed: dict[str, Any], code: str) -> None:
    given: dict[str, Any] = {"index": 0, "name": "left", "cf": EYE.cf, "fa": EYE.fa, **changed}
    with pytest.raises(InvalidDataset) as refused:
        editor(base).edit(SourcePair(**given))
    assert [(problem.pointer, problem.code) for problem in refused.value.problems] == [("left", code)]


@pytest.mark.parametrize(
    "fields", [{"method": "side_by_side"}, {"method": "dual_unet", "modalities": ["cf"]}], ids=["canvas", "cf alone"]
)
def test_models_that_cannot_edit(base: Base, fields: dict[str, Any]) -> None:
    settings = TrainSettings.model_validate({"resolution": 64, **fields})
    with pytest.raises(InvalidSpec, match="cannot edit pairs"):
        check_can_edit(METHODS[settings.method](base, settings))
