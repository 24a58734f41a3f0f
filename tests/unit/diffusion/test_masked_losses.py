"""The losses of masked attention against values worked out by hand, and masks on grids of cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cffa_core.diffusion.masked_losses import attention_loss, attention_target, cells_of, masked_noise_loss, overlap


def test_the_masked_loss_is_a_mean_over_all_cells() -> None:
    noise, said = torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2, 2)
    said[0, 0, 0, 0], said[0, 1, 1, 1], said[0, 0, 0, 1] = 3.0, -1.0, 100.0
    mask = torch.tensor([[[[True, False], [False, True]]]])
    # (3^2 + 1^2) / 8 cells; the 100 lies outside.
    assert masked_noise_loss(said, noise, mask).item() == pytest.approx(1.25)
    assert masked_noise_loss(said, noise, torch.zeros_like(mask)).item() == 0


def test_the_attention_loss_by_hand() -> None:
    """Two rows, two tokens, 2x2 cells; row 0 has both tokens, row 1 the second alone."""
    maps = torch.tensor([
        [[[0.1, 0.2], [0.0, 0.4]], [[0.3, 0.3], [0.3, 0.3]]],
        [[[9.0, 9.0], [9.0, 9.0]], [[0.5, 0.0], [0.25, 0.0]]],
    ])  # fmt: skip
    targets = torch.tensor([
        [[[0.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 0.0]]],
        [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]],
    ])  # fmt: skip
    chosen = torch.tensor([[True, True], [False, True]])
    # Row 0: A / max A = (.25, .5, 0, 1) against (0, 1, 0, 1): (.0625 + .25) / 4; (1, 1, 1, 1): 1 / 4.
    # Row 1: (1, 0, .5, 0) against (1, 0, 0, 0): .25 / 4.
    expected = ((0.0625 + 0.25) / 4 + 1 / 4 + 0.25 / 4) / 2
    assert attention_loss(maps, targets, chosen).item() == pytest.approx(expected)


def test_the_gradient_of_the_attention_loss_goes_to_chosen_tokens_alone() -> None:
    maps = torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    targets = torch.zeros(1, 2, 4, 4)
    attention_loss(maps, targets, torch.tensor([[True, False]])).backward()  # type: ignore[no-untyped-call]
    assert maps.grad is not None and maps.grad[0, 0].abs().sum() > 0 and maps.grad[0, 1].abs().sum() == 0
    nowhere = torch.zeros(1, 1, 4, 4, requires_grad=True)
    loss = attention_loss(nowhere, targets[:, :1], torch.tensor([[True]]))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0 and nowhere.grad is not None and nowhere.grad.isfinite().all()


def test_a_cell_is_marked_if_any_pixel_is_and_the_target_is_its_share() -> None:
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 0, 0] = True  # one pixel of the first cell of 4x4 (64 pixels each)
    mask[0, 8:16, 8:12] = True  # half of a cell
    assert cells_of(mask, 4)[0].nonzero().tolist() == [[0, 0], [1, 1]]
    target = attention_target(mask, 4)
    assert target[0, 1, 1] == 1 and target[0, 0, 0].item() == pytest.approx(1 / 32)
    assert target[0].sum().item() == pytest.approx(1 + 1 / 32)
    assert not target[1].any() and not cells_of(mask, 4)[1].any(), "an empty mask stays empty"


def test_overlap_takes_as_many_cells_as_the_mask_has() -> None:
    target = torch.zeros(16, 16)
    target[2:4, 2:6] = 1.0  # 8 cells
    target[10, 10] = 0.3  # below one half
    shifted = torch.zeros(16, 16)
    shifted[2:4, 4:8] = torch.rand(2, 4, generator=torch.Generator().manual_seed(2)) + 1
    assert overlap(target + 0.01 * torch.rand(16, 16), target) == 1
    assert overlap(shifted, target) == pytest.approx(4 / 12)
    assert math.isnan(overlap(shifted, torch.zeros(16, 16)))
    random = np.random.default_rng(0)
    found = [overlap(torch.from_numpy(random.random((16, 16))), target) for _ in range(300)]
    assert np.mean(found) < 0.04, "a map that knows nothing"
