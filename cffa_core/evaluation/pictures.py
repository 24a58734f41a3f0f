"""Pictures of an evaluation: best, median and worst pairs, nearest training pairs, distances to the training set.

Drawn with Pillow from small previews that are kept of every pair while it comes by, so that nothing is read twice.
The distributions of the alignment scores are drawn by ``figure``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cffa_core.data.contracts import Bytes, PairImages
from cffa_core.data.sheet import BACKGROUND, GAP, HEADING, LABEL, MARGIN, SheetRow, contact_sheet
from cffa_core.evaluation.alignment import ScoredSet
from cffa_core.evaluation.figure import FAINT, INK, PAPER, ticks
from cffa_core.evaluation.memorisation import Match, Memorisation, turned

PREVIEW_SIDE = 320
JPEG_QUALITY = 92
RANKED_BY = "ridge_correlation"
SHOWN = 2  # best, median and worst, each
NEIGHBOURS = 8
CELL = 200
ALARM = (255, 138, 101)
OURS, REAL, LINE = (21, 101, 192), (46, 125, 50), (198, 40, 40)
TURNS = ("as it is", "turned 90°", "turned 180°", "turned 270°",
         "mirrored", "mirrored, 90°", "mirrored, 180°", "mirrored, 270°")  # fmt: skip


@dataclass(frozen=True)
class Preview:
    """A pair at 320 pixels, its images as JPEG files: some 40 kB, so that whole training sets fit into memory."""

    cf_file: bytes
    fa_file: bytes

    def cf(self) -> Bytes:
        """CF (H, W, 3) u8 RGB."""
        return np.asarray(cv2.imdecode(np.frombuffer(self.cf_file, np.uint8), cv2.IMREAD_COLOR_RGB))

    def fa(self) -> Bytes:
        """FA (H, W) u8."""
        return np.asarray(cv2.imdecode(np.frombuffer(self.fa_file, np.uint8), cv2.IMREAD_GRAYSCALE))


def preview(images: PairImages) -> Preview:
    """Small copies of both images of a pair, for people."""
    scale = min(1.0, PREVIEW_SIDE / max(images.fa.shape))
    size = (max(1, round(images.fa.shape[1] * scale)), max(1, round(images.fa.shape[0] * scale)))

    def file(image: Bytes) -> bytes:
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()

    return Preview(file(np.asarray(cv2.cvtColor(images.cf, cv2.COLOR_RGB2BGR))), file(images.fa))


def ranked_pairs(scored: ScoredSet) -> list[tuple[str, int]]:
    """Places of the best, median and worst pairs by ridge correlation: (what it is, index), each pair once."""
    places = [index for index, pair in enumerate(scored.pairs) if pair.true is not None]
    order = sorted(places, key=lambda index: -(scored.pairs[index].true or {})[RANKED_BY])
    count = min(SHOWN, len(order) // 3) or 1
    middle = (len(order) - count) // 2
    wanted = [("best", order[:count]), ("median", order[middle : middle + count]), ("worst", order[-count:])]
    found: dict[int, str] = {}
    for rank, chosen in wanted:
        for index in chosen:
            found.setdefault(index, rank)
    return [(rank, index) for index, rank in found.items()]


def draw_pairs(scored: ScoredSet, previews: Sequence[Preview], path: Path) -> Path | None:
    """Best, median and worst pairs with their checkerboards; None, and no file, if no pair could be scored."""
    rows = []
    for rank, index in ranked_pairs(scored):
        pair = scored.pairs[index]
        scores = pair.true or {}
        label = (
            rank,
            pair.name,
            f"ridge correlation {scores['ridge_correlation']:.2f}",
            f"vessel Dice {scores['vessel_dice']:.2f}",
            f"residual shift {scores['residual_shift_px']:.1f} px",
        )
        rows.append(SheetRow(previews[index].cf(), previews[index].fa(), label))
    if not rows:
        return None
    return contact_sheet(rows, path, title="Best, median and worst pairs by ridge correlation of CF and FA", tiles=6)


def draw_neighbours(
    found: Memorisation,
    names: Sequence[str],
    previews: Sequence[Preview],
    train_names: Sequence[str],
    train_previews: Sequence[Preview],
    path: Path,
) -> Path:
    """The generated pairs that are nearest to a training pair, each beside it; the training pair is turned alike."""
    order = sorted(range(len(names)), key=lambda index: found.generated[index].distance)[:NEIGHBOURS]
    left = MARGIN + 230
    top = MARGIN + 70
    width, height = left + 4 * CELL + 3 * GAP + MARGIN, top + len(order) * (CELL + GAP) + MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (MARGIN, MARGIN - 6), "Pairs nearest to the training set, and their nearest training pairs", HEADING, _font(20)
    )
    for column, head in enumerate(("Generated CF", "Training CF", "Generated FA", "Training FA")):
        pen.text((left + column * (CELL + GAP) + CELL / 2, top - 24), head, HEADING, _font(15), anchor="ma")
    for row, index in enumerate(order):
        near = found.generated[index]
        y = top + row * (CELL + GAP)
        for number, (line, colour) in enumerate(_lines(found, names[index], train_names[near.index], index)):
            pen.text((MARGIN, y + CELL / 2 - 42 + 20 * number), line, colour, _font(14))
        ours, other = previews[index], train_previews[near.index]
        alike = [back(picture, near) for picture in (other.cf(), other.fa())]
        for column, picture in enumerate((ours.cf(), alike[0], ours.fa(), alike[1])):
            sheet.paste(_fitted(picture), (left + column * (CELL + GAP), y))
    sheet.save(path, format="PNG", optimize=True)
    return path


def back(picture: Bytes, match: Match) -> Bytes:
    """A training picture turned as the generated one is: the inverse of the turn that was found."""
    inverse = match.turn if match.turn >= 4 else -match.turn % 4
    planes = np.moveaxis(picture, -1, 0) if picture.ndim == 3 else picture
    result = np.asarray(turned(planes, inverse), dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(result, 0, -1) if picture.ndim == 3 else result)


def _lines(found: Memorisation, name: str, train: str, index: int) -> list[tuple[str, tuple[int, int, int]]]:
    near = found.generated[index]
    flag = ("flagged", ALARM) if found.flagged[index] else ("not flagged", LABEL)
    if found.threshold is None:
        flag = ("no baseline", LABEL)
    distance = f"distance {near.distance:.3f}"
    if found.threshold is not None:
        distance += f" (limit {found.threshold:.3f})"
    return [
        (_short(name), HEADING),
        (f"train {_short(train)}", LABEL),
        (distance, LABEL),
        (TURNS[near.turn], LABEL),
        flag,
    ]


def _short(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:23]}..."


def _fitted(picture: Bytes) -> Image.Image:
    """The picture inside a square cell, its proportions kept."""
    image = Image.fromarray(picture).convert("RGB")
    scale = CELL / max(image.size)
    small = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    cell.paste(small, ((CELL - small.width) // 2, (CELL - small.height) // 2))
    return cell


def draw_distances(found: Memorisation, path: Path) -> Path:
    """Distance to the nearest training pair of every generated and every held-out pair, and the flagging limit."""
    width, height, x0, y0, row = 900, 250, 120, 70, 64
    image = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(image)
    columns = [("generated", OURS, found.generated), ("held-out real", REAL, found.held_out)]
    values = [match.distance for _, _, matches in columns for match in matches]
    high = max([0.05, *values]) * 1.05
    x1, y1 = width - 30, y0 + row * len(columns)

    def x_of(value: float) -> float:
        return x0 + max(value, 0.0) / high * (x1 - x0)

    pen.text((16, 12), "Distance to the nearest training pair (0: a copy)", INK, _font(18))
    for value in ticks(0.0, high):
        pen.line([(x_of(value), y0), (x_of(value), y1)], FAINT)
        pen.text((x_of(value), y1 + 8), f"{value:.2f}", INK, _font(12), anchor="ma")
    jitter = random.Random(0)
    for number, (label, colour, matches) in enumerate(columns):
        middle = y0 + (number + 0.5) * row
        pen.text((x0 - 10, middle), label, INK, _font(14), anchor="rm")
        for match in matches:
            x, y = x_of(match.distance), middle + jitter.uniform(-0.33, 0.33) * row
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
    if found.threshold is not None:
        x = x_of(found.threshold)
        pen.line([(x, y0 - 6), (x, y1)], LINE, width=2)
        note = f"limit {found.threshold:.3f}: 5 % of held-out pairs are nearer"
        pen.text((x, y0 - 10), note, LINE, _font(13), anchor="ls" if x < width / 2 else "rs")
    else:
        pen.text((x0, y0 - 10), "no limit: too few held-out pairs", LINE, _font(13), anchor="ls")
    image.save(path, format="PNG", optimize=True)
    return path


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
