"""What the classifier of findings sees in the pairs of a folder or zip; training it is ``findings``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cffa_core.data.ingest import open_pairs
from cffa_core.data.pairs import to_pair
from cffa_core.evaluation.findings import MODALITIES, SEEN, SIDE, SMALLEST, FindingsClassifier


def list_findings(
    path: Path,
    classifier: FindingsClassifier,
    *,
    eye_pattern: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Probabilities of each finding in each pair, and how many pairs show each (probability at least 0.5).

    Pairs that are not square are padded; larger ones than 512 px are averaged down. ``{"pairs": [{"name", "eye",
    "cf": {finding: probability}, "fa": {...}}], "seen": {"cf": {finding: count}, "fa": {...}}}``. Raises
    ``InvalidDataset`` or ``NotFound`` as the reader of pairs does.
    """
    _, _, opened = open_pairs(path, eye_pattern=eye_pattern, on_progress=on_progress)
    rows: list[dict[str, Any]] = []
    for checked, images in opened:
        side = max(SMALLEST, min(SIDE, max(images.fa.shape)))
        pair = to_pair(checked, images, side)
        shown = {"cf": pair.cf[None], "fa": pair.fa[None].expand(-1, 3, -1, -1)}
        found = {m: classifier.predict(m, shown[m].clamp(-1, 1)) for m in MODALITIES}
        row: dict[str, Any] = {"name": checked.name, "eye": checked.eye}
        for m in MODALITIES:
            row[m] = {name: round(float(p), 4) for name, p in found[m].items()}
        rows.append(row)
    seen = {m: {name: sum(row[m][name] >= 0.5 for row in rows) for name in SEEN[m]} for m in MODALITIES}
    return {"pairs": rows, "seen": seen}
