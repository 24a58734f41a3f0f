"""Masks against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cffa_core.editing.masks import MaskMode, above_quantile, attention_mask, guidance_mask, join, shrink


def test_attention_mask_is_the_smoothed_sum_of_the_words_above_its_quantile() -> None:
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, 1, 1], maps[0, 1, 1, 2] = 2.0, 2.0  # two words, beside each other
    mask = attention_mask(maps, 0.9, (8, 8))
    # The two largest of 16 values: at 0.9 the quantile lies between the second and the third.
    expected = torch.zeros(4, 4)
    expected[1, 1] = expected[1, 2] = 1.0
    assert torch.equal(mask[0, 0], expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_attention_is_smoothed_by_the_kernel_of_ledits() -> None:
    spread = math.exp(-1.0)  # exp(-(1 / (2 * 0.5))^2)
    maps = torch.zeros(1, 1, 5, 5)
    maps[0, 0, 2, 2] = 1.0
    one, side, corner = (torch.tensor(x) / (1 + 2 * spread) ** 2 for x in (1.0, spread, spread**2))
    values = torch.full((5, 5), 0.0)
    values[1:4, 1:4] = corner
    values[2, 1:4] = values[1:4, 2] = side
    values[2, 2] = one
    for quantile in (0.5, 0.7, 0.9, 0.99):
        expected = (values >= torch.quantile(values.flatten(), quantile) - 1e-7).float()
        assert torch.equal(attention_mask(maps, quantile, (5, 5))[0, 0], expected), quantile


def test_guidance_mask_sums_the_channels() -> None:
    guidance = torch.zeros(2, 4, 2, 2)
    guidance[0, :, 0, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])  # sums to 0, but not in magnitude
    guidance[1, 0, 1, 1] = -3.0
    mask = guidance_mask(guidance, 0.9)
    assert mask.tolist() == [[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 1.0]]]]


def test_within_an_area_the_quantile_is_that_of_the_area() -> None:
    values = torch.arange(16.0).reshape(1, 1, 4, 4)
    within = torch.zeros(8, 8, dtype=torch.bool)
    within[0, 0] = within[3, 3] = True  # cells (0, 0) and (1, 1) of a 4x4 grid
    assert shrink(within, (4, 4)).nonzero().tolist() == [[0, 0], [1, 1]]
    mask = above_quantile(values, 0.9, shrink(within, (4, 4)))
    assert mask.nonzero().tolist() == [[0, 0, 1, 1]]  # 5 of {0, 5}, although 15 is the largest of all


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("cf", [1, 1, 0, 0]), ("fa", [1, 0, 1, 0]), ("intersection", [1, 0, 0, 0]), ("union", [1, 1, 1, 0])],
)
def test_one_mask_of_two(mode: MaskMode, expected: list[float]) -> None:
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]]).reshape(2, 1, 2, 2)
    assert join(masks, mode).flatten().tolist() == expected
