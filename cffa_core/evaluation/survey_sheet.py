"""The findings of a survey as pictures: flagged pairs as checkerboards, and pairs before and after registration.

Draws and writes PNG files; what is flagged was decided in ``dataset_survey``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cffa_core.data.contracts import Bytes, CheckedPair, PairImages
from cffa_core.data.pair_check import Registered
from cffa_core.data.sheet import SheetRow, contact_sheet

MOST_ROWS = 24
SIDE = 320


def flagged_names(survey: Mapping[str, Any]) -> list[str]:
    """Names of the pairs that are shown, those with the most flags first."""
    flagged = [pair for pair in survey["pairs"] if pair["flags"]]
    flagged.sort(key=lambda pair: (-len(pair["flags"]), pair["name"]))
    return [pair["name"] for pair in flagged[:MOST_ROWS]]


def flagged_sheet(survey: Mapping[str, Any], pairs: Iterable[tuple[CheckedPair, PairImages]], path: Path) -> bool:
    """Write a contact sheet of flagged pairs, each with a checkerboard; False, and no file, if none is flagged.

    ``pairs`` are looked through once; others than flagged ones may be among them.
    """
    wanted = flagged_names(survey)
    of = {pair["name"]: pair for pair in survey["pairs"]}
    rows: dict[str, SheetRow] = {}
    for pair, images in pairs:
        if pair.name in wanted:
            rows[pair.name] = SheetRow(_small(images.cf), _small(images.fa), _label(of[pair.name]))
    if not rows:
        return False
    shown = [rows[name] for name in wanted if name in rows]
    more = survey["summary"]["flagged"] - len(shown)
    title = f"{survey['summary']['flagged']} of {survey['summary']['pairs']} pairs are flagged"
    contact_sheet(shown, path, title=title + (f" (the first {len(shown)})" if more else ""))
    return True


def registration_sheet(registered: Sequence[Registered], path: Path) -> bool:
    """Write a contact sheet with two rows per pair, before and after; False, and no file, if there is none."""
    rows: list[SheetRow] = []
    for pair in registered:
        before = pair.before
        rows.append(SheetRow(pair.cf, before, (pair.name, "as it came")))
        if pair.after is None:
            rows[-1] = SheetRow(pair.cf, before, (pair.name, "refused, left out"))
        else:
            rows.append(SheetRow(pair.cf, pair.after, (pair.name, "registered")))
    if not rows:
        return False
    contact_sheet(rows, path, title="Automatic registration")
    return True


def _label(pair: Mapping[str, Any]) -> tuple[str, ...]:
    shift = "" if pair["shift_px"] is None else f"shift {pair['shift_px']:.1f} px"
    overlap = "" if pair["vessel_dice"] is None else f"vessel Dice {pair['vessel_dice']:.2f}"
    return tuple(line for line in (pair["name"][:28], *(f"{flag}" for flag in pair["flags"]), shift, overlap) if line)


def _small(pixels: Bytes) -> Bytes:
    scale = SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
