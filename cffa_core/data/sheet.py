"""Contact sheets: pairs as rows of one picture, to be looked at by people.

Draws with Pillow and numpy alone, so that the command line needs no torch. It scales images down for show and never
writes anything that is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (18, 20, 24)
HEADING = (236, 238, 241)
LABEL = (150, 156, 166)
HEADS = ("Colour fundus (CF)", "Angiography (FA)", "Checkerboard of both")
MARGIN = 24
GAP = 10

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class SheetRow:
    """One pair on the sheet: CF ``(H, W, 3)``, FA ``(H, W)`` or ``(H, W, 3)``, both uint8, and its label's lines."""

    cf: Bytes
    fa: Bytes
    label: tuple[str, ...] = ()


def checkerboard(cf: Bytes, fa: Bytes, tiles: int = 8) -> Bytes:
    """CF and FA in alternate squares, ``tiles`` per side: vessels must run on across the borders if they register.

    ``cf`` is ``(H, W, 3)``, ``fa`` ``(H, W)`` or ``(H, W, 3)`` of the same height and width; raises ValueError if not.
    """
    fa = _colour(fa)
    if cf.shape != fa.shape:
        raise ValueError(f"CF is {cf.shape[:2]} and FA {fa.shape[:2]}: a checkerboard needs equal sizes")
    rows = np.arange(cf.shape[0]) * tiles // cf.shape[0]
    columns = np.arange(cf.shape[1]) * tiles // cf.shape[1]
    odd = (rows[:, None] + columns[None, :]) % 2 == 1
    return np.where(odd[..., None], fa, cf)


def contact_sheet(rows: Sequence[SheetRow], path: Path, *, title: str = "", cell: int = 256, tiles: int = 8) -> Path:
    """Write a PNG with one row per pair (CF, FA, checkerboard), column heads and labels; returns ``path``.

    ``cell`` is the width of one image in pixels; the checkerboard is composed at full resolution and then scaled, so
    that its tile borders stay exact. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("a contact sheet needs at least one pair")
    label_font, head_font, title_font = (ImageFont.load_default(size) for size in (14, 16, 22))
    label_width = max((int(label_font.getlength(line)) for row in rows for line in row.label), default=0)
    left = MARGIN + (label_width + 2 * GAP if label_width else 0)
    top = MARGIN + (22 + 2 * GAP if title else 0) + 16 + GAP
    heights = [max(1, round(cell * row.cf.shape[0] / row.cf.shape[1])) for row in rows]
    width = left + 3 * cell + 2 * GAP + MARGIN
    sheet = Image.new("RGB", (width, top + sum(heights) + GAP * (len(rows) - 1) + MARGIN), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((MARGIN, MARGIN - 4), title, fill=HEADING, font=title_font)
    for column, head in enumerate(HEADS):
        middle = left + column * (cell + GAP) + (cell - head_font.getlength(head)) / 2
        pen.text((middle, top - GAP - 16), head, fill=HEADING, font=head_font)
    y = top
    for row, height in zip(rows, heights, strict=True):
        for line_number, line in enumerate(row.label):
            start = y + height / 2 - 10 * len(row.label) + 20 * line_number
            pen.text((MARGIN, start), line, fill=HEADING if line_number == 0 else LABEL, font=label_font)
        for column, image in enumerate((row.cf, row.fa, checkerboard(row.cf, row.fa, tiles))):
            shown = Image.fromarray(_colour(image)).resize((cell, height), Image.Resampling.LANCZOS)
            sheet.paste(shown, (left + column * (cell + GAP), y))
        y += height + GAP
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)
    return path


def _colour(image: Bytes) -> Bytes:
    """``(H, W)`` or ``(H, W, 3)`` as ``(H, W, 3)``."""
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
