"""Parts of a generation as a worker leaves them, with real PNG files and made-up scores, without computing anything."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cffa_core.jobs.records import Claim, StoredFiles
from cffa_core.jobs.spec import GenerationSpec
from cffa_core.jobs.state import UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.recipes.archive import merge_archives, write_part_archive
from cffa_core.recipes.provenance import provenance
from cffa_core.rng import pair_seed
from cffa_core.storage.base import ObjectStore, part_key, result_key

SIDE = 48
HEADER: dict[str, Any] = {
    "synthetic": True,
    "spec": {"count": 10, "seed": 42, "gate": None},
    "model_digest": "ab" * 32,
    "dataset_digest": "cd" * 32,
    "versions": {"cffa": "1", "torch": "2", "diffusers": "3"},
    "numerics_key": "cpu/x",
}


def pixels(modality: str, index: int, side: int = SIDE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """CF ``(S, S, 3)`` RGB or FA ``(S, S)`` of pair ``index``."""
    dice = np.random.default_rng([index, modality == "cf"])
    return dice.integers(0, 256, (side, side, 3) if modality == "cf" else (side, side), dtype=np.uint8)


def write_part(folder: Path, indices: Iterable[int], *, scored: bool = True, side: int = SIDE) -> Path:
    """``cf/``, ``fa/`` and ``part.json``; pair i aligns by i / 10 and resembles a training pair by 1 - i / 10."""
    pairs = []
    for index in indices:
        entry: dict[str, Any] = {"index": index, "seed": pair_seed(42, index), "fa_chroma": 0.5}
        if scored:
            entry |= {
                "try": 0,
                "alignment": {"ridge_correlation": index / 10, "vessel_dice": 0.5},
                "novelty": {"similarity": 1 - index / 10, "nearest": "p3"},
            }
        for modality in ("cf", "fa"):
            drawn = pixels(modality, index, side)
            data = cv2.imencode(".png", drawn[..., ::-1] if modality == "cf" else drawn)[1].tobytes()
            name = f"{modality}/{index:06d}.png"
            (folder / modality).mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            entry[modality] = {"name": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        pairs.append(entry)
    (folder / "part.json").write_text(json.dumps({"pairs": pairs}))
    return folder


def write_archive(folder: Path, count: int, *, part_size: int = 4, scored: bool = True, **header: Any) -> Path:
    """The archive of a whole job of ``count`` pairs below ``folder``."""
    zips = []
    for first in range(0, count, part_size):
        part = write_part(folder / f"part{first}", range(first, min(count, first + part_size)), scored=scored)
        zips.append(folder / f"part{first}.zip")
        write_part_archive(part, zips[-1], HEADER | header)
    merge_archives(zips, folder / "archive.zip", HEADER | header)
    return folder / "archive.zip"


def commit_part(store: JobStore, objects: ObjectStore, claim: Claim, folder: Path, *, scored: bool = True) -> None:
    """Store and commit the claimed part as a worker would."""
    assert isinstance(claim.spec, GenerationSpec)
    place = folder / claim.unit_id
    write_part(place, claim.spec.part_range(claim.index), scored=scored)
    index = write_part_archive(place, place / "pairs.zip", _header(claim))
    (place / "part.json").write_text(json.dumps(index))
    stored = {
        name: objects.put_file(part_key(claim.job_id, claim.index, claim.attempt, name), place / name)
        for name in ("pairs.zip", "part.json")
    }
    store.commit(claim, StoredFiles(stored), {"pairs": [pair["index"] for pair in index["pairs"]]})


def commit_whole(store: JobStore, objects: ObjectStore, claim: Claim, folder: Path) -> None:
    """Join the parts that :func:`commit_part` left in ``folder``, and commit the claimed end of the job."""
    parts = store.parts(claim.owner, claim.job_id, kind=UnitKind.PART)
    zips = [folder / part.unit_id / "pairs.zip" for part in parts]
    merged = merge_archives(zips, folder / "archive.zip", _header(claim))
    key = result_key(claim.job_id, claim.kind, claim.attempt, "archive.zip")
    stored = StoredFiles({"archive.zip": objects.put_file(key, folder / "archive.zip")})
    store.commit(claim, stored, {"pairs": merged["pairs"]}, job_result={})


def _header(claim: Claim) -> dict[str, Any]:
    assert isinstance(claim.spec, GenerationSpec)
    known: dict[str, Any] = {"model_digest": "ab" * 32, "dataset_digest": "cd" * 32, "numerics_key": "cpu/x"}
    return provenance(claim.spec.settings(), **known)
