"""The guidance of a step against sums worked out by hand."""

from __future__ import annotations

import torch

from cffa_core.editing.guidance import EncodedEdit, edit_guidance
from cffa_core.jobs.edit_spec import EditTerm

NOTHING = torch.zeros(1)


def edit(**fields: object) -> EncodedEdit:
    return EncodedEdit(EditTerm.model_validate({"text": "x", "threshold": 0.97, **fields}), NOTHING, ((1,), (1,)))


def one_hot(*cells: tuple[int, int]) -> torch.Tensor:
    field = torch.zeros(4, 4)
    for cell in cells:
        field[cell] = 1.0
    return field


# The CF's words look at (0, 0), the FA's at (3, 3); start-of-text, which no mask may use, looks elsewhere.
MAPS = torch.stack(
    [torch.stack([9 * one_hot((2, 0)), one_hot((0, 0))]), torch.stack([9 * one_hot((2, 0)), one_hot((3, 3))])]
)
REFERENCE = torch.full((2, 1, 4, 4), 0.5)
PREDICTED = REFERENCE + torch.stack([one_hot((0, 0), (1, 1)), 2 * one_hot((3, 3), (1, 1))])[:, None]


def test_one_mask_for_both_images_each_with_its_own_guidance() -> None:
    guidance, touched = edit_guidance([edit(strength=3.0)], REFERENCE, PREDICTED[None], MAPS[None], 900, "union")
    assert torch.equal(touched, one_hot((0, 0), (3, 3)) > 0)  # above t = 800 attention alone decides
    assert torch.equal(guidance[0, 0], 3.0 * one_hot((0, 0)))
    assert torch.equal(guidance[1, 0], 6.0 * one_hot((3, 3)))


def test_below_800_the_guidance_must_be_large_too() -> None:
    predicted = PREDICTED.clone()
    predicted[0] = REFERENCE[0] + one_hot((1, 1))  # the CF's guidance is not where its words look
    found = {
        t: edit_guidance([edit(strength=1.0)], REFERENCE, predicted[None], MAPS[None], t, "union")[1]
        for t in (801, 800)
    }
    assert torch.equal(found[801], one_hot((0, 0), (3, 3)) > 0)
    assert torch.equal(found[800], one_hot((3, 3)) > 0)


def test_edits_add_up_and_removing_is_the_opposite() -> None:
    terms = [edit(strength=2.0), edit(strength=5.0, direction="remove")]
    guidance, _ = edit_guidance(
        terms, REFERENCE, torch.stack([PREDICTED, PREDICTED]), torch.stack([MAPS, MAPS]), 900, "cf"
    )
    assert torch.equal(guidance[0, 0], (2.0 - 5.0) * one_hot((0, 0)))
    assert not guidance[1].any()  # the FA predicts no change where the CF's mask is


def test_warmup_and_cooldown_bound_the_steps() -> None:
    def steps(found: EncodedEdit) -> list[int]:
        return [i for i in range(6) if found.acts_at(i)]

    assert steps(edit()) == [0, 1, 2, 3, 4, 5]
    assert steps(edit(warmup=2)) == [2, 3, 4, 5]
    assert steps(edit(warmup=1, cooldown=3)) == [1, 2]
