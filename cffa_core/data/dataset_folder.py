"""The checked data set on disk: ``dataset.json`` and lossless PNG files, written by ``ingest``, read by ``pairs``.

Names in it are safe as file names and object keys. What is read here was written by CFFA itself; files of strangers
come through ``ingest``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cffa_core.data.contracts import MASK_NAME, Bytes, CheckedPair, PairImages
from cffa_core.errors import CorruptArtifact, InvalidDataset, StorageUnavailable

FORMAT = "cffa-dataset/1"
INDEX = "dataset.json"
CAPTIONS = "captions.jsonl"
KINDS = ("cf", "fa", "valid_cf", "valid_fa")
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def safe_names(names: list[str]) -> dict[str, str]:
    """A safe, unique name for each name: itself, or its safe characters and a digest.

    A digest is also added where two names differ in letter case only.
    """
    safe: dict[str, str] = {}
    folded = Counter(name.casefold() for name in names)
    for name in names:
        if SAFE.fullmatch(name) and folded[name.casefold()] == 1:
            safe[name] = name
        else:
            stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-")[:80] or "pair"
            safe[name] = f"{stem}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return safe


def write(
    folder: Path, digest: str, pairs: Iterable[tuple[CheckedPair, PairImages]], *, captions: str = ""
) -> dict[str, Any]:
    """Write pairs, then ``captions`` (the text of captions.jsonl, if there are any), then the index, so that a folder
    with an index is complete. Returns the index."""
    entries: list[dict[str, Any]] = []
    try:
        for kind in KINDS:
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for pair, images in pairs:
            files = {kind: f"{kind}/{pair.name}.png" for kind in KINDS}
            _save(folder / files["cf"], np.asarray(cv2.cvtColor(images.cf, cv2.COLOR_RGB2BGR)))
            _save(folder / files["fa"], images.fa)
            _save(folder / files["valid_cf"], images.valid_cf.astype(np.uint8) * 255)
            _save(folder / files["valid_fa"], images.valid_fa.astype(np.uint8) * 255)
            masks = {name: f"masks/{name}/{pair.name}.png" for name in pair.masks}
            for name, file in masks.items():
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                _save(folder / file, images.masks[name].astype(np.uint8) * 255)
            entries.append(
                {
                    "name": pair.name,
                    "eye": pair.eye,
                    **({} if pair.patient is None else {"patient": pair.patient}),
                    **({} if pair.original_name is None else {"original_name": pair.original_name}),
                    **files,
                    **({"masks": masks} if masks else {}),
                    "width": pair.width,
                    "height": pair.height,
                    "registration": pair.registration,
                    "residual_px": pair.residual_px,
                }
            )
        if captions:
            (folder / CAPTIONS).write_text(captions, encoding="utf-8")
        index = {"format": FORMAT, "digest": digest, "pairs": entries}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageUnavailable(f"the data set cannot be written to {folder}: {error.strerror}") from error
    return index


def write_fa(folder: Path, name: str, images: PairImages) -> None:
    """Write the files of a pair that change when its FA is registered anew: the FA and its valid region."""
    for kind, pixels in (("fa", images.fa), ("valid_fa", images.valid_fa.astype(np.uint8) * 255)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        _save(folder / kind / f"{name}.png", pixels)


def _save(path: Path, pixels: Bytes) -> None:
    _, encoded = cv2.imencode(".png", pixels)
    path.write_bytes(encoded.tobytes())


def is_dataset_folder(path: Path) -> bool:
    """True for a folder that :func:`write` has finished."""
    return (path / INDEX).is_file()


def read_index(folder: Path) -> tuple[str, list[CheckedPair]]:
    """Digest and pairs of a checked data set. Raises ``CorruptArtifact`` if the index is not one."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise CorruptArtifact(f"{folder / INDEX}: format {index['format']!r} is not {FORMAT!r}")
        pairs = [_entry(entry) for entry in index["pairs"]]
        return str(index["digest"]), pairs
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{folder / INDEX} is not a data-set index: {error}") from error


def pairs_of(index: Mapping[str, Any]) -> list[CheckedPair]:
    """The pairs that an index lists, in its order; raises ``CorruptArtifact`` if it is not one."""
    try:
        return [_entry(entry) for entry in index["pairs"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"not a data-set index: {error}") from error


def files_of(entry: Mapping[str, Any]) -> list[str]:
    """Names of the files of one pair, in a fixed order: images, valid regions, masks."""
    return [*(entry[kind] for kind in KINDS), *(file for _, file in sorted(entry.get("masks", {}).items()))]


def read_split(folder: Path) -> dict[str, list[str]] | None:
    """Names of the pairs for train, validation and test, if the data set is a version with a split."""
    try:
        split = json.loads((folder / INDEX).read_text(encoding="utf-8")).get("split")
        return None if split is None else {str(part): [str(name) for name in names] for part, names in split.items()}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise CorruptArtifact(f"{folder / INDEX} is not a data-set index: {error}") from error


def part_folder(folder: Path, part: str, target: Path) -> Path:
    """A data set ``target`` that holds one part of a split alone; its images are those of ``folder``, by links.

    Raises ``InvalidDataset`` if ``folder`` has no split, or nothing in this part.
    """
    names = (read_split(folder) or {}).get(part)
    if not names:
        raise InvalidDataset(f"the data set has no pairs for {part}; make a version of it with a split by eye")
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    wanted = set(names)
    chosen = [entry for entry in index["pairs"] if entry["name"] in wanted]
    digest = hashlib.sha256(f"{index['digest']} {part}".encode()).hexdigest()
    target.mkdir(parents=True)
    for entry in folder.iterdir():
        if entry.name != INDEX:
            (target / entry.name).symlink_to(entry.resolve(), target_is_directory=entry.is_dir())
    made = {**index, "digest": digest, "pairs": chosen, "split": {part: names}}
    (target / INDEX).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return target


def _entry(entry: dict[str, Any]) -> CheckedPair:
    if not SAFE.fullmatch(entry["name"]):
        raise ValueError(f"unsafe pair name {entry['name']!r}")
    residual = entry["residual_px"]
    masks = tuple(sorted(entry.get("masks", {})))
    if not all(MASK_NAME.fullmatch(name) for name in masks):
        raise ValueError(f"unknown masks {masks}")
    return CheckedPair(
        name=str(entry["name"]),
        eye=str(entry["eye"]),
        width=int(entry["width"]),
        height=int(entry["height"]),
        registration=entry["registration"],
        residual_px=None if residual is None else float(residual),
        masks=masks,
        patient=None if entry.get("patient") is None else str(entry["patient"]),
        original_name=None if entry.get("original_name") is None else str(entry["original_name"]),
    )


def read_pairs(folder: Path, pairs: Iterable[CheckedPair]) -> Iterator[tuple[CheckedPair, PairImages]]:
    """Pixels of each pair. Raises ``CorruptArtifact`` for a missing, damaged or resized file."""
    for pair in pairs:
        cf = _load(folder / "cf" / f"{pair.name}.png", cv2.IMREAD_COLOR, pair)
        fa = _load(folder / "fa" / f"{pair.name}.png", cv2.IMREAD_GRAYSCALE, pair)
        valid_cf = _load(folder / "valid_cf" / f"{pair.name}.png", cv2.IMREAD_GRAYSCALE, pair) > 127
        valid_fa = _load(folder / "valid_fa" / f"{pair.name}.png", cv2.IMREAD_GRAYSCALE, pair) > 127
        masks = {
            name: _load(folder / "masks" / name / f"{pair.name}.png", cv2.IMREAD_GRAYSCALE, pair) > 127
            for name in pair.masks
        }
        yield pair, PairImages(np.asarray(cv2.cvtColor(cf, cv2.COLOR_BGR2RGB)), fa, valid_cf, valid_fa, masks)


def _load(path: Path, flag: int, pair: CheckedPair) -> Bytes:
    try:
        data = np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise CorruptArtifact(f"{path} cannot be read: {error.strerror}") from error
    pixels = cv2.imdecode(data, flag) if data.size else None
    if pixels is None or pixels.shape[:2] != (pair.height, pair.width):
        raise CorruptArtifact(f"{path} is not the {pair.width}x{pair.height} image of the index")
    return np.asarray(pixels, dtype=np.uint8)
