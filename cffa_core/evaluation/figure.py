"""A picture of an alignment report: every pair as a dot, true against shuffled, beside the ceiling.

Drawn with Pillow alone; what the numbers mean is said in ``report``.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw, ImageFont

from cffa_core.evaluation.alignment import ScoredSet
from cffa_core.evaluation.report import TITLES, AlignmentReport, in_words
from cffa_core.evaluation.scores import HIGHER_IS_BETTER, SHIFT

PANEL_WIDTH, PANEL_HEIGHT = 300, 360
LEFT, TOP, BOTTOM = 52, 44, 46
INK, FAINT, PAPER = (30, 30, 34), (208, 208, 214), (255, 255, 255)
COLOURS = {"true": (21, 101, 192), "shuffled": (150, 150, 158), "ceiling": (46, 125, 50)}
MAX_SHIFT = 20.0  # larger shifts are drawn at the top edge

Columns = list[tuple[str, tuple[int, int, int], list[float]]]


def draw(report: AlignmentReport) -> Image.Image:
    """Draw the report: one panel per score, six panels in two rows."""
    image = Image.new("RGB", (3 * PANEL_WIDTH, 2 * PANEL_HEIGHT + 60), PAPER)
    pen = ImageDraw.Draw(image)
    scored = report.pairs.scored
    title = f"Alignment of {report.pairs.source}: {len(scored.pairs)} pairs of {in_words(scored.whose)}"
    pen.text((14, 8), title, INK, font=_font(18))
    note = f"dot: a pair (shuffled: mean over its partners); bar: median; shifts above {MAX_SHIFT:.0f} px on top"
    pen.text((14, image.height - 20), note, INK, font=_font(12))
    for index, score in enumerate((*HIGHER_IS_BETTER, SHIFT)):
        corner = (index % 3 * PANEL_WIDTH, 36 + index // 3 * PANEL_HEIGHT)
        columns = _columns(report, score)
        limit = MAX_SHIFT if score == SHIFT else max((v for _, _, values in columns for v in values), default=1.0)
        low = min(0.0, *(v for _, _, values in columns for v in values), 0.0)
        _panel(pen, corner, TITLES.get(score, "residual shift (px)"), columns, (low, max(limit, 0.05) * 1.06))
    return image


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _columns(report: AlignmentReport, score: str) -> Columns:
    def of(scored: ScoredSet, *, shuffled: bool) -> list[float]:
        return [float(value) for value in scored.values(score, shuffled=shuffled)[0]]

    columns: Columns = [
        ("pairs", COLOURS["true"], of(report.pairs.scored, shuffled=False)),
        ("shuffled", COLOURS["shuffled"], of(report.pairs.scored, shuffled=True)),
    ]
    if report.ceiling is not None:
        columns.append(("reference", COLOURS["ceiling"], of(report.ceiling.scored, shuffled=False)))
        columns.append(("shuffled", COLOURS["shuffled"], of(report.ceiling.scored, shuffled=True)))
    return columns


def ticks(low: float, high: float) -> list[float]:
    """Four to nine round values between ``low`` and ``high``."""
    rough = (high - low) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _panel(
    pen: ImageDraw.ImageDraw, corner: tuple[int, int], title: str, columns: Columns, span: tuple[float, float]
) -> None:
    """One panel: an axis, and per column the dots and a bar at their median."""
    x0, y0 = corner[0] + LEFT, corner[1] + TOP
    x1, y1 = corner[0] + PANEL_WIDTH - 14, corner[1] + PANEL_HEIGHT - BOTTOM
    low, high = span

    def height_of(value: float) -> float:
        return y1 - (min(value, high) - low) / (high - low) * (y1 - y0)

    pen.text((x0, corner[1] + 14), title, INK, font=_font(15))
    for value in ticks(low, high):
        pen.line([(x0, height_of(value)), (x1, height_of(value))], FAINT)
        pen.text(
            (x0 - 6, height_of(value)), f"{value:.2f}" if high < 5 else f"{value:.0f}", INK, _font(11), anchor="rm"
        )
    width = (x1 - x0) / len(columns)
    jitter = random.Random(0)
    for number, (label, colour, values) in enumerate(columns):
        middle = x0 + (number + 0.5) * width
        for value in values:
            x, y = middle + jitter.uniform(-0.25, 0.25) * width, height_of(value)
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        if values:
            bar = height_of(sorted(values)[len(values) // 2])
            pen.line([(middle - 0.36 * width, bar), (middle + 0.36 * width, bar)], INK, width=2)
        pen.text((middle, y1 + 8), label, INK, font=_font(12), anchor="ma")
