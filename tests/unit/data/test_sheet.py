"""Contact sheets: the checkerboard alternates exactly, the picture has a cell per image, bad input is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cffa_core.data.sheet import SheetRow, checkerboard, contact_sheet

RED = np.full((64, 64, 3), (200, 10, 10), np.uint8)
GREY = np.full((64, 64), 90, np.uint8)


def test_checkerboard_alternates_starting_with_cf() -> None:
    board = checkerboard(RED, GREY, tiles=4)
    for row in range(4):
        for column in range(4):
            square = board[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected = (200, 10, 10) if (row + column) % 2 == 0 else (90, 90, 90)
            assert (square == expected).all(), (row, column)


def test_checkerboard_covers_sides_that_do_not_divide() -> None:
    board = checkerboard(np.zeros((50, 70, 3), np.uint8), np.full((50, 70), 255, np.uint8), tiles=8)
    assert board.shape == (50, 70, 3)
    assert 0.45 < board.mean() / 255 < 0.55


def test_checkerboard_refuses_unequal_sizes() -> None:
    with pytest.raises(ValueError, match="equal sizes"):
        checkerboard(RED, GREY[:32])


def test_sheet_shows_each_pair_in_a_row_of_three(tmp_path: Path) -> None:
    rows = [SheetRow(RED, GREY, ("pair 0", "seed 1")), SheetRow(RED, GREY, ("pair 1", "seed 2"))]
    path = contact_sheet(rows, tmp_path / "new" / "sheet.png", title="Pairs", cell=64)
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    # Two rows of one CF, one FA and half a checkerboard each; a little grey is letters of the heads.
    assert (picture == (200, 10, 10)).all(2).sum() == 2 * 1.5 * 64 * 64
    assert (picture == (90, 90, 90)).all(2).sum() == pytest.approx(2 * 1.5 * 64 * 64, abs=50)


def test_sheet_needs_a_pair(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([], tmp_path / "sheet.png")
