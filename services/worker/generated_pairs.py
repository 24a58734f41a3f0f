"""Single pairs of a generation job as a folder of images, read as byte ranges of the archives of their parts.

So an evaluation of 256 pairs of a large job fetches 256 pairs. Which pairs is the matter of ``orders``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.records import StoredFiles
from cffa_core.recipes.archive import images_of
from cffa_core.storage.base import ObjectInfo, ObjectStore
from cffa_core.storage.manifest import read_verified

MODALITIES = ("cf", "fa")


def fetch_pairs(
    objects: ObjectStore,
    parts: StoredFiles,
    indices: Collection[int],
    folder: Path,
    on_pair: Callable[[int, int], None],
) -> Path:
    """Write ``cf/000017.png`` and ``fa/000017.png`` of each of ``indices`` below ``folder`` and return it.

    Masks and sheets of edited pairs stay where they are. ``parts`` holds ``NNNNN/part.json`` and ``NNNNN/pairs.zip`` of
    every part that has one of them; ``on_pair(done, total)`` is called per pair. Raises ``CorruptArtifact`` for bytes
    other than the recorded ones, or for a pair that is not there, and ``NotFound`` if the job's files were removed.
    """
    wanted, done = set(indices), 0
    for modality in MODALITIES:
        (folder / modality).mkdir(parents=True)
    for archive, listing in part_objects(parts):
        for pair in listed(objects, listing):
            if pair["index"] not in wanted:
                continue
            both = {modality: pair[modality] for modality in MODALITIES}
            for modality, image in read_images(objects, archive, both).items():
                (folder / modality / f"{pair['index']:06d}.png").write_bytes(image)
            done += 1
            on_pair(done, len(wanted))
    if done != len(wanted):
        raise CorruptArtifact(f"the parts hold {done} of the {len(wanted)} pairs that are to be measured")
    return folder


def part_objects(parts: StoredFiles) -> list[tuple[ObjectInfo, ObjectInfo]]:
    """Archive and listing of each part, in order."""
    names = sorted(name.removesuffix("part.json") for name in parts.files if name.endswith("/part.json"))
    return [(parts.files[f"{name}pairs.zip"], parts.files[f"{name}part.json"]) for name in names]


def listed(objects: ObjectStore, info: ObjectInfo) -> list[dict[str, Any]]:
    """The pairs that a part's listing names, by rising index; raises ``CorruptArtifact``."""
    try:
        pairs: list[dict[str, Any]] = json.loads(read_verified(objects, info))["pairs"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"the index of pairs {info.key} is not readable: {error}") from error
    return pairs


def read_images(objects: ObjectStore, archive: ObjectInfo, pair: dict[str, Any]) -> dict[str, bytes]:
    """The PNG files that a pair's entry names, in one read: they stand side by side. Raises ``CorruptArtifact``."""
    names = images_of(pair)
    begin = min(int(pair[name]["offset"]) for name in names)
    end = max(int(pair[name]["offset"]) + int(pair[name]["size"]) for name in names)
    with objects.open(archive.key, begin, end - begin) as stream:
        whole = stream.read()
    images = {}
    for name in names:
        entry = pair[name]
        first = int(entry["offset"]) - begin
        images[name] = whole[first : first + int(entry["size"])]
        if hashlib.sha256(images[name]).hexdigest() != entry["sha256"]:
            raise CorruptArtifact(f"image {entry['name']} of {archive.key} does not match its recorded sha256")
    return images
