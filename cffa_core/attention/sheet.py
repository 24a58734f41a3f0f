"""Sheets of heat maps: lines of small pictures, each with its word above and a figure below, for people to look at.

Draws with Pillow; it scales pictures down for show and never writes anything that is read back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cffa_core.attention.heat import colours
from cffa_core.data.sheet import BACKGROUND, GAP, HEADING, LABEL, MARGIN

Bytes = NDArray[np.uint8]

HEAD = 22
NOTE = 18


@dataclass(frozen=True)
class Cell:
    """One small picture ``(H, W, 3)`` uint8, what stands above it, and what below."""

    picture: Bytes
    head: str
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A title and its pictures; the first stands for the whole line and begins it anew where it is broken."""

    title: str
    cells: tuple[Cell, ...]


def draw_sheet(title: str, subtitle: str, lines: Sequence[Line], *, cell: int = 176, columns: int = 6) -> Bytes:
    """The sheet as ``(H, W, 3)`` uint8; lines longer than ``columns`` are broken.

    Raises ``ValueError`` for a sheet or a line without pictures.
    """
    if not lines or not all(line.cells for line in lines):
        raise ValueError("a sheet needs lines, and every line a picture")
    title_font, line_font, head_font, note_font = (ImageFont.load_default(size) for size in (24, 18, 15, 12))
    width_of_most = max(min(columns, len(line.cells)) for line in lines)
    width = 2 * MARGIN + max(width_of_most * (cell + GAP) - GAP, 3 * cell)
    row = HEAD + cell + NOTE + GAP
    rows = [-(-(len(line.cells) - 1) // max(columns - 1, 1)) or 1 for line in lines]
    top = MARGIN + 30 + 24
    height = top + sum(30 + count * row + GAP for count in rows) + 44 + MARGIN // 2
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 6), title, HEADING, title_font)
    pen.text((MARGIN, MARGIN + 26), _fitting(subtitle, width - 2 * MARGIN, note_font), LABEL, note_font)
    y = top
    for line, count in zip(lines, rows, strict=True):
        pen.text((MARGIN, y + 2), line.title, HEADING, line_font)
        pen.line([(MARGIN, y + 27), (width - MARGIN, y + 27)], (48, 52, 60))
        y += 30
        for number, shown in enumerate(line.cells):
            at, column = (0, 0) if number == 0 else divmod(number - 1, max(columns - 1, 1))
            left = MARGIN + (0 if number == 0 else column + 1) * (cell + GAP)
            upper = y + at * row
            head = _fitting(shown.head, cell, head_font)
            pen.text((left + cell / 2, upper + HEAD / 2 + 2), head, HEADING, head_font, "mm")
            sheet.paste(_fitted(shown.picture, cell), (left, upper + HEAD))
            pen.text((left + cell / 2, upper + HEAD + cell + NOTE / 2), shown.note, LABEL, note_font, "mm")
        y += count * row + GAP
    bar = colours(np.linspace(0, 1, 180, dtype=np.float32)[None].repeat(12, axis=0))
    sheet.paste(Image.fromarray(bar), (MARGIN, y + 6))
    pen.text((MARGIN + 192, y + 12), "little to much, each map on its own scale", LABEL, note_font, "lm")
    drawn: Bytes = np.asarray(sheet, dtype=np.uint8)
    return drawn


def _fitted(picture: Bytes, cell: int) -> Image.Image:
    """The picture in a square of its sheet, its proportions kept."""
    image = Image.fromarray(picture)
    scale = cell / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    square = Image.new("RGB", (cell, cell), BACKGROUND)
    square.paste(small, ((cell - small.width) // 2, (cell - small.height) // 2))
    return square


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text``, its end replaced by dots where it is wider than ``width``."""
    while len(text) > 4 and font.getlength(text) > width:
        text = text[:-4].rstrip() + "..."
    return text
