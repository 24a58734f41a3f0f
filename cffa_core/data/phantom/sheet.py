"""Contact sheets: phantoms side by side with their masks and captions, for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from . import Phantom

COLOURS: dict[str, tuple[int, int, int]] = {
    "macula": (90, 90, 60),
    "disc": (150, 150, 60),
    "cup": (230, 230, 120),
    "leakage": (60, 140, 60),
    "vein": (70, 90, 255),
    "artery": (255, 60, 60),
    "haemorrhage": (170, 0, 170),
    "exudate": (255, 220, 0),
    "microaneurysm": (0, 255, 255),
}
CAPTION_HEIGHT = 16


def contact_sheet(phantoms: Sequence[Phantom], columns: int = 2, tile: int = 256) -> Image.Image:
    """Sheet with ``columns`` eyes per row, each CF | FA | coloured masks at ``tile`` pixels and a caption below."""
    if not phantoms:
        raise ValueError("a contact sheet needs at least one phantom")
    rows = -(-len(phantoms) // columns)
    sheet = Image.new("RGB", (columns * 3 * tile, rows * (tile + CAPTION_HEIGHT)), (24, 24, 24))
    pen = ImageDraw.Draw(sheet)
    for index, phantom in enumerate(phantoms):
        left, top = (index % columns) * 3 * tile, (index // columns) * (tile + CAPTION_HEIGHT)
        fa = np.repeat(phantom.fa[..., None], 3, axis=2)
        for place, picture in enumerate((phantom.cf, fa, mask_overlay(phantom))):
            small = cv2.resize(picture, (tile, tile), interpolation=cv2.INTER_AREA)
            sheet.paste(Image.fromarray(np.asarray(small, np.uint8)), (left + place * tile, top))
        text = ", ".join((*phantom.findings, f"{phantom.phase} phase"))
        pen.text((left + 4, top + tile + 2), f"{phantom.name} {phantom.eye}: {text}", fill=(220, 220, 220))
    return sheet


def mask_overlay(phantom: Phantom) -> npt.NDArray[np.uint8]:
    """All masks in their colours on black, (H, W, 3) uint8; later entries of COLOURS lie on top."""
    picture = np.zeros((*phantom.fa.shape, 3), np.uint8)
    for token, colour in COLOURS.items():
        picture[phantom.masks[token]] = colour
    return picture
