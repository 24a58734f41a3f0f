"""Writes phantoms as a data-set folder that the data-set reader accepts (METHODS 1, layout a)."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2

from cffa_core.rng import derive_seed


def write_phantoms(
    folder: Path,
    n: int,
    seed: int,
    resolution: int = 512,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    processes: int | None = None,
) -> None:
    """Write ``n`` pairs as cf/NAME.png, fa/NAME.png, masks/<token>/NAME.png, captions.jsonl and eyes.csv.

    Pair i is ``make_phantom(derive_seed(seed, "phantom", i))`` whatever ``processes`` is (default: one per core).
    Captions are lines ``{"name", "cf", "fa", "findings", "phase", "eye"}``; each phantom is an eye of its own.
    ``on_progress(done, n)`` is called after each pair.
    """
    for part in ("cf", "fa"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    work = partial(_write_one, folder, seed, resolution)
    workers = min(processes or os.cpu_count() or 1, n)
    rows = []
    if workers <= 1 or n < 8:
        for index in range(n):
            rows.append(work(index))
            if on_progress:
                on_progress(index + 1, n)
    else:
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            for index, row in enumerate(pool.imap(work, range(n), chunksize=2)):
                rows.append(row)
                if on_progress:
                    on_progress(index + 1, n)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "captions.jsonl").write_text(lines, encoding="utf-8")
    with (folder / "eyes.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(["name", "eye"])
        writer.writerows([row["name"], f"{row['name']}-{row['eye']}"] for row in rows)


def _write_one(folder: Path, seed: int, resolution: int, index: int) -> dict[str, object]:
    """Make and write pair ``index``; return its captions line."""
    from . import make_phantom

    cv2.setNumThreads(1)
    phantom = make_phantom(derive_seed(seed, "phantom", index), resolution).renamed(f"p{index:05d}")
    file = f"{phantom.name}.png"
    cv2.imwrite(str(folder / "cf" / file), cv2.cvtColor(phantom.cf, cv2.COLOR_RGB2BGR))
    cv2.imwrite(str(folder / "fa" / file), phantom.fa)
    for token, mask in phantom.masks.items():
        (folder / "masks" / token).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / "masks" / token / file), mask.astype("uint8") * 255)
    return {
        "name": phantom.name,
        "cf": phantom.cf_caption,
        "fa": phantom.fa_caption,
        "findings": list(phantom.findings),
        "phase": phantom.phase,
        "eye": phantom.eye,
    }
