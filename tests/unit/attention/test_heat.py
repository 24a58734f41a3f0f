"""Heat maps are hot where the map is, whatever the picture, and sheets hold every cell."""

from __future__ import annotations

import numpy as np
import pytest

from cffa_core.attention.heat import colours, marked, overlay, scaled
from cffa_core.attention.sheet import Cell, Line, draw_sheet


def test_the_overlay_is_brightest_where_the_map_is_hottest() -> None:
    heat = np.zeros((4, 8), dtype=np.float32)
    heat[1, 6] = 0.02
    for picture in (np.full((32, 64, 3), 90, np.uint8), np.full((32, 64), 90, np.uint8)):
        drawn = overlay(picture, heat).astype(int).sum(2)
        assert drawn.shape == (32, 64)
        row, column = np.unravel_index(int(drawn.argmax()), drawn.shape)
        assert (row // 8, column // 8) == (1, 6)
        # Away from it nothing differs from place to place: the grey picture under an even cold colour.
        assert np.ptp(drawn[:, :24]) == 0


def test_scales() -> None:
    assert scaled(np.full((2, 2), 3.0, np.float32)).tolist() == [[0, 0], [0, 0]]
    assert scaled(np.float32([[1, 2, 5]])).tolist() == [[0, 0.25, 1]]
    assert scaled(np.float32([[1, 2, 5]]), (0, 4)).tolist() == [[0.25, 0.5, 1]]
    luminance = colours(np.linspace(0, 1, 9, dtype=np.float32)).astype(float) @ (0.3, 0.6, 0.1)
    assert (np.diff(luminance) > 0).all()


def test_a_mark_is_a_ring_and_the_picture_stays_as_it_was() -> None:
    picture = np.zeros((56, 56, 3), np.uint8)
    drawn = marked(picture, (0.25, 0.75))
    assert not picture.any()
    rows, columns = np.nonzero(drawn.max(2) > 128)
    assert (rows.mean() / 56, columns.mean() / 56) == (pytest.approx(0.75, abs=0.02), pytest.approx(0.25, abs=0.02))
    assert drawn[42, 14].max() < 64


def test_a_sheet_breaks_long_lines_and_shows_every_picture() -> None:
    levels = range(60, 250, 20)
    cells = tuple(Cell(np.full((20, 20, 3), level, np.uint8), "word") for level in levels)
    drawn = draw_sheet("title", "subtitle", [Line("line", cells)], cell=40, columns=4)
    for level in levels:
        assert (drawn == level).all(2).sum() >= 40 * 40
    with pytest.raises(ValueError):
        draw_sheet("title", "", [Line("line", ())])
