"""Frangi's map finds known vessels, and only inside the eye; the drawing is soft, tiles are coarse."""

from __future__ import annotations

import numpy as np
import pytest

from cffa_core.data.phantom import Phantom, make_phantom
from cffa_core.data.vessel_map import frangi_vessels, scribble, tile


@pytest.fixture(scope="module")
def eye() -> Phantom:
    return make_phantom(3, 192, findings=frozenset())


def test_frangi_finds_the_vessels_of_an_eye_whose_vessels_are_known(eye: Phantom) -> None:
    found, true = frangi_vessels(eye.cf, eye.valid_cf), eye.masks["vessel"]
    precision = (found & true).sum() / found.sum()
    recall = (found & true).sum() / true.sum()
    assert precision > 0.6 and recall > 0.4
    by_chance = true[eye.valid_cf].mean()
    assert precision > 3 * by_chance


def test_bright_lines_are_no_vessels(eye: Phantom) -> None:
    """The same picture with the contrast of its vessels reversed."""
    found = frangi_vessels(255 - eye.cf, eye.valid_cf)
    true = eye.masks["vessel"]
    assert (found & true).sum() / max(1, found.sum()) < 0.3


def test_the_rim_of_the_aperture_is_no_vessel(eye: Phantom) -> None:
    found = frangi_vessels(eye.cf, eye.valid_cf)
    assert not found[~eye.valid_cf].any()
    half = eye.valid_cf.copy()
    half[:, :96] = False
    right = frangi_vessels(eye.cf, half)
    assert right.any() and not right[:, :97].any()


def test_an_eye_that_nobody_saw_has_no_vessels() -> None:
    assert not frangi_vessels(np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), bool)).any()


def test_the_drawing_is_soft_and_white_where_vessels_are_broad() -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:30] = True
    drawn = scribble(mask)
    assert drawn.dtype == np.uint8
    assert (drawn[25] == 255).all() and (drawn[0] == 0).all()
    assert 0 < drawn[19, 30] < drawn[20, 30] < 255


def test_a_tile_keeps_the_broad_and_loses_the_fine() -> None:
    rows, columns = np.mgrid[:64, :64]
    broad = (80 + columns).astype(np.uint8)
    fine = ((rows + columns) % 2 * 100 + 50).astype(np.uint8)
    assert np.abs(tile(broad, 16).astype(int) - broad).max() <= 2
    assert tile(fine, 16).std() < 1 < fine.std()
    colour = tile(np.stack([broad, fine, broad], -1), 16)
    assert np.array_equal(colour[..., 0], tile(broad, 16)) and colour.shape == (64, 64, 3)
    assert np.array_equal(tile(fine, 64), fine)
