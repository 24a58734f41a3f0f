"""Export generated pairs: chosen ones, in the form that somebody reads, as archives of bounded size.

    zip         pairs-000000.zip   archives as a generation job makes them (``archive``), read back by everything here
    webdataset  pairs-000000.tar   NNNNNN.cf.png, NNNNNN.fa.png, NNNNNN.json; NNNNNN.mask.png of an edited pair
    dicom       dicom-000000.zip   NNNNNN/cf.dcm, NNNNNN/fa.dcm: Ophthalmic Photography, Synthetic Data = YES

Images are passed on as they are (but for DICOM, which holds their pixels); every pair takes its provenance along. One
pair is in memory at a time, one archive on disk. The same pairs and settings give the same bytes. Edited pairs leave
their sheets behind, which are for people; DICOM has their CF and FA alone. Knows no jobs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from cffa_core.data.contracts import Bytes
from cffa_core.data.dicom import PairIdentity, dicom_file
from cffa_core.data.export_layouts import TarSink, ZipSink
from cffa_core.errors import CorruptArtifact, InvalidSpec, Problem
from cffa_core.jobs.spec import ExportForm, ExportSettings
from cffa_core.recipes.archive import without_places, write_part_archive
from cffa_core.recipes.selection import require_synthetic

FORMAT = "cffa-export/1"
NAMES = {"zip": "pairs-{:06d}.zip", "webdataset": "pairs-{:06d}.tar", "dicom": "dicom-{:06d}.zip"}


@dataclass(frozen=True)
class GeneratedPair:
    """One pair on its way out: its entry of a manifest, and its PNG files by what they show, as they were stored."""

    entry: dict[str, Any]
    images: Mapping[str, bytes]

    @classmethod
    def read(cls, entry: Mapping[str, Any], read: Callable[[dict[str, Any]], Mapping[str, bytes]]) -> GeneratedPair:
        """The pair of a manifest's entry; ``read`` gets the entry of what is exported and returns its images."""
        kept = {key: value for key, value in entry.items() if key != "sheet"}
        return cls(kept, read(kept))


@dataclass(frozen=True)
class Shard:
    """One finished archive. ``first`` and ``last`` are the smallest and largest index of its pairs."""

    path: Path
    pairs: int
    first: int
    last: int


def export_shards(
    pairs: Iterable[GeneratedPair], settings: ExportSettings, header: Mapping[str, Any], folder: Path
) -> Iterator[Shard]:
    """Write archives of ``settings.shard_size`` pairs into ``folder``, yielding each when it is complete.

    The caller may move or remove an archive before it asks for the next. ``header`` is that of the pairs' own manifest
    (spec, model digest, ...). Raises ``CorruptArtifact`` for an image that is not what its entry says, ``InvalidSpec``
    if there is no pair at all, and for DICOM of pairs that may show a patient.
    """
    require_synthetic(settings.form, header)
    shard: _Open | None = None
    number = 0
    try:
        for pair in pairs:
            _verify(pair)
            if shard is None:
                shard = _Open(folder / NAMES[settings.form].format(number), settings, header)
            shard.add(pair)
            if len(shard.indices) == settings.shard_size:
                complete, shard = shard, None
                yield complete.finish()
                number += 1
        if shard is not None:
            complete, shard = shard, None
            yield complete.finish()
        elif number == 0:
            message = "no pair fits the selection; ask for less"
            raise InvalidSpec(message, problems=(Problem("/selection", "nothing_selected", message),))
    finally:
        if shard is not None:
            shard.abandon()


def export_manifest(
    settings: ExportSettings, header: Mapping[str, Any], source: Mapping[str, Any], files: list[dict[str, Any]]
) -> str:
    """What an export holds and from what, as it is written: no ids, no places, no times.

    ``source`` names what was exported by digest, ``files`` name, number of pairs, size and SHA-256 of each archive.
    """
    manifest = {
        "format": FORMAT,
        **header,
        "export": settings.model_dump(mode="json"),
        "source": source,
        "pairs": sum(file["pairs"] for file in files),
        "files": files,
    }
    return json.dumps(manifest, indent=1, sort_keys=True) + "\n"


def provenance(entry: Mapping[str, Any], header: Mapping[str, Any]) -> dict[str, Any]:
    """Where one pair comes from: its entry of the manifest, without places in a zip, and the archive's header."""
    return {**header, "synthetic": True, **without_places(entry)}


class _Open:
    """An archive that takes pairs."""

    def __init__(self, path: Path, settings: ExportSettings, header: Mapping[str, Any]) -> None:
        self.indices: list[int] = []
        self._path = path
        selection = settings.selection.model_dump(mode="json")
        self._writer = _WRITERS[settings.form](path, {**header, "selection": selection})

    def add(self, pair: GeneratedPair) -> None:
        self._writer.add(pair)
        self.indices.append(int(pair.entry["index"]))

    def finish(self) -> Shard:
        self._writer.close()
        return Shard(self._path, len(self.indices), min(self.indices), max(self.indices))

    def abandon(self) -> None:
        """Let go of open files; what was written so far is nothing yet."""
        self._writer.abandon()


class _Writer(Protocol):
    """One form of archive."""

    def add(self, pair: GeneratedPair) -> None:
        """Write one pair."""

    def close(self) -> None:
        """Write what is left; the archive is complete."""

    def abandon(self) -> None:
        """Close without completing."""


class _Zip:
    """A zip of the kind that holds the parts of a job: the pairs as files first, then the one writer of such zips."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._path = path
        self._header = header
        self._folder = path.with_name(f"{path.name}.pairs")
        self._entries: list[dict[str, Any]] = []
        self._folder.mkdir(parents=True)

    def add(self, pair: GeneratedPair) -> None:
        for image, data in pair.images.items():
            (self._folder / image).mkdir(exist_ok=True)
            (self._folder / pair.entry[image]["name"]).write_bytes(data)
        self._entries.append(pair.entry)

    def close(self) -> None:
        (self._folder / "part.json").write_text(json.dumps({"pairs": self._entries}))
        write_part_archive(self._folder, self._path, self._header)
        shutil.rmtree(self._folder)

    def abandon(self) -> None:
        shutil.rmtree(self._folder)


class _WebDataset:
    """A shard of a WebDataset: members that share the name up to the first dot are one sample."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._header = header
        self._sink = TarSink(path)

    def add(self, pair: GeneratedPair) -> None:
        key = f"{int(pair.entry['index']):06d}"
        for image, data in pair.images.items():
            self._sink.put(f"{key}.{image}.png", data)
        self._sink.put(f"{key}.json", json.dumps(provenance(pair.entry, self._header), sort_keys=True).encode())

    def close(self) -> None:
        self._sink.close()

    abandon = close


class _Dicom:
    """A zip of DICOM files, a folder per pair."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self._header = header
        self._sink = ZipSink(path)

    def add(self, pair: GeneratedPair) -> None:
        identity = PairIdentity.of(provenance(pair.entry, self._header))
        for modality, read in (("cf", cv2.IMREAD_COLOR_RGB), ("fa", cv2.IMREAD_GRAYSCALE)):
            file = dicom_file(_pixels(pair, modality, read), modality, identity)
            self._sink.put(f"{identity.index:06d}/{modality}.dcm", file)

    def close(self) -> None:
        self._sink.close()

    abandon = close


_WRITERS: dict[ExportForm, Callable[[Path, dict[str, Any]], _Writer]] = {
    "zip": _Zip,
    "webdataset": _WebDataset,
    "dicom": _Dicom,
}


def _pixels(pair: GeneratedPair, modality: str, read: int) -> Bytes:
    """CF ``(H, W, 3)`` RGB, FA ``(H, W)``; raises ``CorruptArtifact`` if the PNG cannot be read."""
    found = cv2.imdecode(np.frombuffer(pair.images[modality], np.uint8), read)
    if found is None:
        raise CorruptArtifact(f"{pair.entry[modality]['name']} is not a readable PNG")
    return np.asarray(found, np.uint8)


def _verify(pair: GeneratedPair) -> None:
    for image, data in pair.images.items():
        entry = pair.entry[image]
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CorruptArtifact(f"{entry['name']} does not have the recorded size and sha256")
