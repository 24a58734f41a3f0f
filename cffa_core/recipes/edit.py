"""Edit pairs by text, one part of the grid at a time: one readable script over the parts (METHODS 5).

A pair depends on (settings, model, its index, its pixels) only: not on which worker edits it, or beside which others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from cffa_core.data.contracts import PairImages
from cffa_core.data.ingest import open_pairs
from cffa_core.data.pairs import PairSet, square
from cffa_core.data.sheet import SheetRow, contact_sheet
from cffa_core.editing.denoiser import BaseAlone, check_can_edit
from cffa_core.editing.editor import EditedPair, PairEditor, SourcePair, check_source
from cffa_core.errors import InvalidDataset, InvalidSpec, Problem
from cffa_core.evaluation.pair_scores import score_pairs
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.edit_spec import EditSettings, EditTerm
from cffa_core.methods.method import PairMethod
from cffa_core.methods.pair_sampler import synthetic_marks, to_uint8, write_png
from cffa_core.methods.registry import load_method
from cffa_core.models.base import Base, load_base
from cffa_core.models.checkpoint import folder_digest

__all__ = [
    "PairEditor",
    "SourcePair",
    "edit_part",
    "editor_of",
    "load_editor",
    "read_areas",
    "read_sources",
    "sources_of",
]

OUTLINE = (90, 230, 140)
SHEET_CELL = 224


def load_editor(
    settings: EditSettings,
    model: Path | None,
    base: str | Path,
    device: str = "cpu",
    *,
    models_dir: Path | None = None,
) -> PairEditor:
    """Load base and model once for all parts; without a model the base alone edits.

    Raises ``ModelUnavailable`` if either is missing or they do not belong together, ``CorruptArtifact`` if the model's
    files are damaged, ``InvalidSpec`` for prompts the base cannot take and a method that cannot edit.
    """
    loaded = load_base(base, device=device, dtype=settings.precision, models_dir=models_dir)
    if model is None:
        return editor_of(loaded, settings)
    return editor_of(load_method(model, loaded), settings, folder_digest(model))


def editor_of(model: PairMethod | Base, settings: EditSettings, digest: str | None = None) -> PairEditor:
    """An editor with a model that is loaded, or with a base alone; raises ``InvalidSpec`` as :func:`load_editor`."""
    if isinstance(model, Base):
        return PairEditor(BaseAlone(model), settings)
    check_can_edit(model)
    return PairEditor(model, settings, model_digest=digest)


def sources_of(pairs: PairSet) -> Iterator[SourcePair]:
    """Pairs of a loaded set, in its order, as sources of an edit."""
    for index, pair in enumerate(pairs):
        yield SourcePair(index, pair.name, to_uint8(pair.cf), to_uint8(pair.fa)[..., 0])


def read_sources(
    path: Path, resolution: int, *, names: Sequence[str] | None = None, areas: Mapping[str, Path] | None = None
) -> Iterator[SourcePair]:
    """The pairs of a folder or zip in any of the accepted layouts, one at a time, in order of name (or of ``names``).

    Padded to a square and resized to ``resolution``; numbered from 0. ``areas`` are pictures of the only area that may
    change, by name. Raises ``InvalidDataset`` with all problems (a pair without its partner among them), for a name
    that is not there, and for an area that is not of its pair's size or is empty.
    """
    _, listed, decoded = open_pairs(path)
    there = {pair.name for pair in listed}
    wanted = list(names) if names is not None else sorted(there)
    if missing := sorted((set(wanted) | set(areas or {})) - there):
        problems = tuple(Problem(name, "unknown_pair", f"there is no pair {name!r} in {path.name}") for name in missing)
        raise InvalidDataset(f"{path.name} has no pairs {', '.join(missing[:5])}", problems=problems)
    index = {name: place for place, name in enumerate(wanted)}
    for checked, images in decoded:
        if checked.name not in index:
            continue
        area = (areas or {}).get(checked.name)
        sized = square(images, resolution)
        where = None if area is None else _area(checked.name, area, images, resolution)
        yield SourcePair(index[checked.name], checked.name, sized.cf, sized.fa, where)


def read_areas(folder: Path) -> dict[str, Path]:
    """The PNGs of a folder by name: areas that may change, white on black. Raises ``InvalidDataset`` if it has none."""
    found = {path.stem: path for path in sorted(folder.glob("*.png"))}
    if not found:
        message = f"{folder.name} holds no NAME.png; draw the areas white on black, named as the pairs"
        raise InvalidDataset(message, problems=(Problem(folder.name, "no_areas", message),))
    return found


def _area(name: str, path: Path, images: PairImages, resolution: int) -> NDArray[np.bool_]:
    """The area of a pair at ``resolution``, padded and resized as the pair."""
    drawn = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if drawn is None:
        raise _unusable(name, "mask_unreadable", f"{path.name} is no picture; write it as PNG, white on black")
    if drawn.shape != images.fa.shape:
        raise _unusable(name, "mask_size", f"it is {drawn.shape}, the pair {images.fa.shape}; draw it at that size")
    area = drawn > 127
    if not area.any():
        raise _unusable(name, "mask_empty", "it is empty; draw it white on black")
    marked = PairImages(images.cf, images.fa, images.valid_cf, images.valid_fa, {"area": area})
    return square(marked, resolution).masks["area"]


def _unusable(name: str, code: str, message: str) -> InvalidDataset:
    said = f"the area of pair {name!r} cannot be used: {message}"
    return InvalidDataset(said, problems=(Problem(name, code, said),))


def edit_part(
    editor: PairEditor, settings: EditSettings, sources: Sequence[SourcePair], out: Path, context: JobContext
) -> None:
    """Edit ``sources`` into ``out/cf/000017.png`` and ``out/fa/000017.png``, and describe them in ``out/part.json``.

    Beside them ``mask/000017.png`` (how much of the edit each pixel has: where it is 0, both images are the source's)
    and ``sheet/000017.png`` (before, after, and the mask's outline). ``part.json`` has what that of `generate_part`
    has, and of each pair ``source`` (its name), the alignment ``before``, ``mask_share``,
    ``round_trip`` and ``spill``. Raises
    ``InvalidDataset`` for a pair that cannot be edited, before any is; ``InvalidSpec`` for other settings than the
    editor's.
    """
    if settings != editor.settings:
        raise InvalidSpec("the editor was loaded for other settings; load it again with these")
    for source in sources:
        check_source(source, settings.resolution)
    total = editor.steps * len(sources)
    entries = []
    for place, source in enumerate(sources):

        def on_step(done: int, _: int, first: int = place * editor.steps) -> None:
            context.progress("editing", first + done, total)

        entries.append(_save(editor, source, editor.edit(source, on_step), out))
    out.mkdir(parents=True, exist_ok=True)
    description = {"pairs": sorted(entries, key=lambda entry: int(entry["index"])), "exhausted": []}
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    (out / "part.json").write_text(text, encoding="utf-8")


def _save(editor: PairEditor, source: SourcePair, edited: EditedPair, out: Path) -> dict[str, Any]:
    """Write the files of one pair; return its entry."""
    stem = f"{source.index:06d}"
    said = "; ".join(describe_edit(term) for term in editor.settings.edits) or "none"
    before, after = score_pairs([(source.cf, source.fa), (edited.cf, edited.fa)])
    mask = np.round(edited.weight * 255).astype(np.uint8)

    def marks(modality: str) -> dict[str, str]:
        return synthetic_marks(modality, source.index, edited.seed, editor.model_digest) | {"Edit": said}

    return {
        "index": source.index,
        "seed": edited.seed,
        "try": 0,
        "source": source.name,
        "alignment": after.alignment,
        "alignment_before": before.alignment,
        "novelty": None,
        "fa_chroma": edited.fa_chroma,
        "mask_share": round(float((edited.weight > 0).mean()), 4),
        "round_trip": edited.round_trip,
        "spill": edited.spill,
        "cf": write_png(out, f"cf/{stem}.png", edited.cf, marks("cf")),
        "fa": write_png(out, f"fa/{stem}.png", edited.fa, marks("fa")),
        "mask": write_png(out, f"mask/{stem}.png", mask),
        "sheet": _sheet(source, edited, out, f"sheet/{stem}.png", said),
    }


def describe_edit(term: EditTerm) -> str:
    """An edit in words: ``add haemorrhages``."""
    fa = f" (FA: {term.fa_text})" if term.fa_text else ""
    return f"{term.direction} {term.text}{fa}"


def _sheet(source: SourcePair, edited: EditedPair, out: Path, name: str, said: str) -> dict[str, Any]:
    """Before, after, and after with the outline of what may have changed; name, size and SHA-256 of the picture."""
    inside = (edited.weight > 0).astype(np.uint8)
    drawn = [edited.cf.copy(), np.repeat(edited.fa[..., None], 3, axis=2)]
    outlines, _ = cv2.findContours(inside, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    for image in drawn:
        cv2.drawContours(image, outlines, -1, OUTLINE, max(1, len(inside) // 256))
    rows = [
        SheetRow(source.cf, source.fa, ("before", source.name)),
        SheetRow(edited.cf, edited.fa, ("after",)),
        SheetRow(drawn[0], drawn[1], ("after", "the mask", "outlined")),
    ]
    written = contact_sheet(rows, out / name, title=said, cell=SHEET_CELL).read_bytes()
    return {"name": name, "size": len(written), "sha256": hashlib.sha256(written).hexdigest()}
