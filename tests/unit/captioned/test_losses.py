"""The losses against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from cffa_core.captioned.losses import contrastive, pull, reconstruction, same_text

ZERO = torch.tensor(0.0)


def test_contrastive_by_hand() -> None:
    """Two orthogonal pairs at temperature 1: each row is a softmax of (1, 0)."""
    text = image = torch.eye(2)
    expected = -math.log(math.e / (math.e + 1))
    assert contrastive(text, image, torch.eye(2, dtype=torch.bool), ZERO).item() == pytest.approx(expected)
    swapped = -math.log(1 / (math.e + 1))
    assert contrastive(text, image.flip(0), torch.eye(2, dtype=torch.bool), ZERO).item() == pytest.approx(swapped)


def test_equal_captions_are_no_negatives() -> None:
    """Three pictures of one caption: nothing can tell them apart, and the loss asks for nothing."""
    text, image = torch.ones(3, 4), torch.ones(3, 4)
    assert contrastive(text, image, torch.ones(3, 3, dtype=torch.bool), ZERO).item() == pytest.approx(0, abs=1e-6)
    assert contrastive(text, image, torch.eye(3, dtype=torch.bool), ZERO).item() == pytest.approx(math.log(3))


def test_same_text() -> None:
    ids = torch.tensor([[1, 5, 3], [1, 6, 3], [1, 5, 3]])
    assert same_text(ids).tolist() == [[True, False, True], [False, True, False], [True, False, True]]


def test_pull_moves_the_text_alone() -> None:
    text, image = torch.zeros(2, 3, requires_grad=True), torch.full((2, 3), 2.0, requires_grad=True)
    loss = pull(text, image)
    loss.backward()
    assert loss.item() == 4 and image.grad is None and text.grad is not None


def test_reconstruction_by_hand() -> None:
    """A step of 1 in one of four columns: pixels 0.25, differences along x 2/3 (two of three), along y 0; maps 0.5."""
    images = torch.zeros(1, 1, 4, 4)
    drawn = images.clone()
    drawn[..., 1] = 1
    maps, drawn_maps = [torch.zeros(1, 2), torch.zeros(1, 2)], [torch.ones(1, 2), torch.zeros(1, 2)]
    assert reconstruction(drawn, images, drawn_maps, maps).item() == pytest.approx(0.25 + 2 / 3 + 0.5)
    assert reconstruction(images, images, maps, maps).item() == 0
