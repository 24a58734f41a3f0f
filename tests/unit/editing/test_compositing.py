"""What is laid onto a pair's pixels, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cffa_core.editing.compositing import (
    inner_weight,
    lay_on,
    mean_difference,
    pixel_weight,
    seen_area,
    strongly_changed,
)


def test_the_weight_is_one_on_the_cells_and_nothing_three_cells_away() -> None:
    touched = np.zeros((8, 8), bool)
    touched[3, 3] = True  # pixels 24..31
    weight = pixel_weight(touched, 8)
    assert weight.shape == (64, 64)
    assert (weight[24:32, 24:32] == 1).all()
    row = weight[28]
    assert row[32 + 7] == 1  # 8 pixels away
    assert row[32 + 15] == pytest.approx(0.5)  # 16 away
    assert (row[32 + 23 :] == 0).all()  # 24 away and more
    assert (np.diff(row[31:]) <= 0).all()
    assert not pixel_weight(np.zeros((8, 8), bool), 8).any()


def test_a_drawn_area_keeps_all_that_is_outside_and_has_a_soft_border_inside() -> None:
    where = np.zeros((32, 32), bool)
    where[8:24, 8:24] = True
    weight = inner_weight(where, 8)
    assert not weight[~where].any()
    assert weight[16, 8:12].tolist() == pytest.approx([0.25, 0.5, 0.75, 1.0])
    # At the picture's own border there is nothing to hide.
    assert (inner_weight(np.ones((32, 32), bool), 8) == 1).all()


def test_a_weak_change_is_laid_onto_the_source_s_own_detail() -> None:
    source = np.full((32, 32), 100, np.uint8)
    source[::2] = 120  # detail that the decoder has not
    before, after = np.full((32, 32), 90, np.uint8), np.full((32, 32), 90, np.uint8)
    after[12:20, 24:28] = 93
    weight = np.ones((32, 32), np.float32)
    laid = lay_on(source, before, after, weight)
    assert np.array_equal(laid[:, :16], source[:, :16])
    assert int(laid[16, 26]) - int(laid[15, 26]) >= 14  # of 20: a quarter of the way to the decoded picture


def test_a_strong_change_is_the_edited_picture_itself() -> None:
    source, before = np.full((32, 32), 100, np.uint8), np.full((32, 32), 100, np.uint8)
    source[14:18, 14:18] = 20  # a lesion, of which the decoder has half, and its neighbourhood dark instead
    before[12:20, 12:20] = 60
    after = np.full((32, 32), 100, np.uint8)  # removed
    laid = lay_on(source, before, after, np.ones((32, 32), np.float32))
    assert (laid == 100).all()
    kept = lay_on(source, before, after, np.zeros((32, 32), np.float32))
    assert np.array_equal(kept, source)
    half = lay_on(source, before, after, np.full((32, 32), 0.5, np.float32))
    assert half[16, 16] == 60
    colour = [np.repeat(image[..., None], 3, axis=2) for image in (source, before, after)]
    assert (lay_on(colour[0], colour[1], colour[2], np.ones((32, 32), np.float32)) == 100).all()


def test_no_change_is_no_change_and_bright_ends_at_255() -> None:
    flat, full = np.full((32, 32), 250, np.uint8), np.ones((32, 32), np.float32)
    decoded = np.full((32, 32), 90, np.uint8)
    assert np.array_equal(lay_on(flat, decoded, decoded, full), flat)
    assert strongly_changed(np.full((32, 32), 6.0, np.float32)) == pytest.approx(0.5)
    assert (lay_on(flat, decoded, decoded + np.uint8(11), full) >= 90).all()
    assert lay_on(np.full((32, 32), 254, np.uint8), decoded, decoded + np.uint8(2), full).max() <= 255


def test_the_rim_of_an_aperture_is_not_tissue() -> None:
    rows, columns = np.mgrid[:128, :128]
    inside = (rows - 64) ** 2 + (columns - 64) ** 2 < 60**2
    noise = np.random.default_rng(0).integers(90, 140, (128, 128))
    fa = np.where(inside, noise, 0).astype(np.uint8)
    area = seen_area(np.repeat(fa[..., None], 3, axis=2), fa, 16)
    reach = np.sqrt((rows - 64) ** 2 + (columns - 64) ** 2)
    assert area[reach < 40].all()
    assert not area[reach > 48].any()
    whole = noise.astype(np.uint8)
    assert seen_area(np.repeat(whole[..., None], 3, axis=2), whole, 16).all()


def test_the_difference_of_no_pixels_is_none() -> None:
    empty = np.zeros((0,), np.uint8)
    assert mean_difference(empty, empty) == 0.0
    assert mean_difference(np.array([0, 10], np.uint8), np.array([4, 0], np.uint8)) == 7.0
