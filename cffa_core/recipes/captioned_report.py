"""What people look at of a captioned model's work: a sheet of pictures with their texts, and the report in Markdown.

Draws with Pillow alone. How near captions are to those that were known is counted here too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from cffa_core.captioned.scores import same_words, token_f1
from cffa_core.data.contracts import CheckedPair
from cffa_core.data.sheet import BACKGROUND, GAP, HEADING, LABEL, MARGIN
from cffa_core.evaluation.bootstrap import Eyes, estimate

SHOWN = 24
COLUMNS = 4
SIDE = 200
LINE = 15
LINES = 5


@dataclass(frozen=True)
class Cell:
    """One picture of the sheet, ``(H, W, 3)`` or ``(H, W)`` uint8, its name and the texts that belong to it."""

    name: str
    image: NDArray[np.uint8]
    texts: tuple[str, ...]


def sheet(cells: Sequence[Cell]) -> NDArray[np.uint8]:
    """All cells, four in a row: the picture, under it its name and as much of its first text as fits."""
    small, tiny = ImageFont.load_default(13), ImageFont.load_default(11)
    height = SIDE + LINE * (LINES + 1) + GAP
    columns, rows = min(COLUMNS, len(cells)), -(-len(cells) // COLUMNS)
    size = (2 * MARGIN + columns * (SIDE + GAP) - GAP, 2 * MARGIN + rows * height - GAP)
    made = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(made)
    for number, cell in enumerate(cells):
        x, y = MARGIN + number % COLUMNS * (SIDE + GAP), MARGIN + number // COLUMNS * height
        picture = Image.fromarray(cell.image).convert("RGB")
        made.paste(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (x, y))
        pen.text((x, y + SIDE + 3), cell.name[:28], HEADING, small)
        for place, line in enumerate(wrapped(cell.texts[0], SIDE, tiny)[:LINES]):
            pen.text((x, y + SIDE + 4 + LINE * (place + 1)), line, LABEL, tiny)
    return np.asarray(made)


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """A text in lines of at most ``width`` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def against_known(
    said: Mapping[str, str], known: Mapping[str, str], pairs: Iterable[CheckedPair]
) -> dict[str, Any] | None:
    """Token F1 and share of captions that are the known ones word for word, over the pairs that have a known one.

    ``said`` has a caption by name of each pair. Intervals are over patients where the pairs have them, else over eyes.
    None if no caption is known.
    """
    found = [pair for pair in pairs if pair.name in known]
    if not found:
        return None
    patients = {pair.eye: pair.patient for pair in found if pair.patient is not None}
    eyes = Eyes(tuple(pair.eye for pair in found), patients)
    f1 = np.array([token_f1(said[pair.name], known[pair.name]) for pair in found])
    exact = np.array([float(same_words(said[pair.name], known[pair.name])) for pair in found])
    return {
        "token_f1": estimate(f1, eyes, label="token_f1").to_dict(),
        "exact": estimate(exact, eyes, label="exact").to_dict(),
    }


def report_text(report: Mapping[str, Any], cells: Sequence[Cell]) -> str:
    """The report in Markdown: what was done, with what, and the first pictures with their texts."""
    task = {"text_to_image": "Pictures from texts", "image_to_text": "Captions of pictures"}[report["task"]]
    model, settings = report["model"], report["settings"]
    lines = [f"# {task}", "", f"{report['pictures']} pictures ({report['modality'].upper()}), 224 x 224. "]
    lines[-1] += f"Model of step {model['step']}, digest `{model['digest'][:16]}`."
    if report["task"] == "text_to_image":
        steps = f"{settings['ddim_steps']} DDIM steps, guidance {settings['guidance_scale']:g}"
        lines.append(steps if settings["use_diffusion"] else "Decoded directly, without diffusion.")
    else:
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        lines.append(", ".join(f"{name} {settings[name]:g}" for name in names))
    for name, found in (report.get("against_known") or {}).items():
        title = {"token_f1": "Token F1 against the known captions", "exact": "Word for word the known caption"}[name]
        between = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
        patients = f" of {found['patients']} known patients" if "patients" in found else ""
        lines += ["", f"{title}: {found['value']:.3f}{between}, N = {found['n']}, {found['eyes']} eyes{patients}"]
    lines += ["", "![sheet](sheet.png)", "", "| picture | text |", "|---|---|"]
    for cell in cells:
        texts = "<br>".join(text.replace("|", "\\|") for text in cell.texts)
        lines.append(f"| {cell.name} | {texts} |")
    return "\n".join(lines) + "\n"
