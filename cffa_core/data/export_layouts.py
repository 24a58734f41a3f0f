"""The forms in which pairs leave: files by name into a folder or zip, shards of tar files, an image folder.

Every writer takes pairs one at a time and holds none of their pixels; equal pairs give equal bytes (fixed times, owners
and order). What the accompanying documents say is ``export_card``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np

from cffa_core.data.contracts import Bytes, Mask
from cffa_core.data.dataset_folder import FORMAT, INDEX
from cffa_core.data.export_source import ExportPair

EPOCH = (1980, 1, 1, 0, 0, 0)
UNIX, FILE_MODE = 3, 0o100644 << 16
PAIRS = "pairs.json"
FOLDERS = {"cf": "cf", "fa": "fa", "valid_cf": "fov_cf", "valid_fa": "fov_fa"}  # of an image folder


class Sink(Protocol):
    """Takes whole files by name, in the order in which they shall stand."""

    def put(self, name: str, data: bytes) -> None:
        """Write one file."""

    def close(self) -> None:
        """Write what is left."""


class FolderSink:
    """Files below ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, name: str, data: bytes) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def close(self) -> None:
        """Nothing is left to do."""


class ZipSink:
    """Members of a zip, stored (PNG does not deflate), with fixed times and attributes."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def put(self, name: str, data: bytes) -> None:
        member = zipfile.ZipInfo(name, EPOCH)
        member.create_system, member.external_attr = UNIX, FILE_MODE
        self._archive.writestr(member, data)

    def close(self) -> None:
        self._archive.close()


class TarSink:
    """Members of a tar, with fixed times, owners and attributes."""

    def __init__(self, path: Path) -> None:
        self._tar = tarfile.open(path, "w")  # noqa: SIM115 - stays open for the members to come

    def put(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        self._tar.close()


class Writer(Protocol):
    """One form. After the last pair, :meth:`finish` writes the index and returns its name and content."""

    def add(self, item: ExportPair) -> None:
        """Write one pair."""

    def finish(self) -> tuple[str, bytes]:
        """Write what describes all pairs."""

    def put(self, name: str, data: bytes) -> None:
        """Write a further document."""

    def close(self) -> None:
        """Let go of open files, finished or not."""


class Files:
    """``cf/NAME.png``, ``fa/``, ``valid_cf/``, ``valid_fa/``, ``masks/TOKEN/``, then ``dataset.json`` and ``eyes.csv``.

    It is a checked data set as the service keeps it, and as such is read back with its masks of what was seen.
    """

    def __init__(self, sink: Sink, digest: str, origin: dict[str, Any]) -> None:
        self._sink = sink
        self._head = {"format": FORMAT, "digest": digest, "origin": origin}
        self._entries: list[dict[str, Any]] = []

    def add(self, item: ExportPair) -> None:
        name = item.pair.name
        files: dict[str, Any] = {}
        for kind, data in _images(item):
            files[kind] = f"{kind}/{name}.png"
            self.put(files[kind], data)
        masks = {token: f"masks/{token}/{name}.png" for token in item.masks}
        for token, mask in item.masks.items():
            self.put(masks[token], _mask_png(mask))
        entry = {**_fields(item), **files}
        # The reader knows some masks as part of a pair; the others lie beside it.
        for key, tokens in (("masks", item.pair.masks), ("annotations", sorted(set(masks) - set(item.pair.masks)))):
            if tokens:
                entry[key] = {token: masks[token] for token in tokens}
        self._entries.append(entry)

    def finish(self) -> tuple[str, bytes]:
        table = io.StringIO()
        rows = csv.writer(table, lineterminator="\n")
        columns = ["name", "eye", *(["patient"] if any("patient" in entry for entry in self._entries) else [])]
        rows.writerow(columns)
        rows.writerows([entry.get(column, "") for column in columns] for entry in self._entries)
        self.put("eyes.csv", table.getvalue().encode())
        index = _index(self._head, self._entries)
        self.put(INDEX, index)
        return INDEX, index

    def put(self, name: str, data: bytes) -> None:
        self._sink.put(name, data)

    def close(self) -> None:
        self._sink.close()


class Shards:
    """WebDataset: ``cffa-000000.tar`` ... with ``KEY.cf.png``, ``KEY.fa.png``, masks and ``KEY.json`` per pair."""

    def __init__(self, root: Path, shard_pairs: int) -> None:
        self._root = root
        self._shard_pairs = shard_pairs
        self._keys: set[str] = set()
        self._tar: TarSink | None = None
        self._entries: list[dict[str, Any]] = []
        self.shards: list[Path] = []

    def add(self, item: ExportPair) -> None:
        if len(self._entries) % self._shard_pairs == 0:
            self.close()
            self.shards.append(self._root / f"cffa-{len(self.shards):06d}.tar")
            self._tar = TarSink(self.shards[-1])
        key = self._key(item.pair.name)
        for kind, data in _images(item):
            self._member(f"{key}.{kind}.png", data)
        for token, mask in item.masks.items():
            self._member(f"{key}.mask_{token}.png", _mask_png(mask))
        fields = {**_fields(item), "masks": sorted(item.masks)}
        self._member(f"{key}.json", json.dumps(fields, sort_keys=True).encode())
        self._entries.append({"key": key, "shard": self.shards[-1].name, **fields})

    def finish(self) -> tuple[str, bytes]:
        self.close()
        index = _index({}, self._entries)
        self.put(PAIRS, index)
        return PAIRS, index

    def put(self, name: str, data: bytes) -> None:
        (self._root / name).write_bytes(data)

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None

    def _key(self, name: str) -> str:
        """The pair's name without dots: a reader takes all before the first dot as the key."""
        key = name.replace(".", "_")
        if key in self._keys:
            key = f"{key}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        self._keys.add(key)
        return key

    def _member(self, name: str, data: bytes) -> None:
        assert self._tar is not None
        self._tar.put(name, data)


class ImageFolder:
    """``cf/000000.png``, ``fa/``, ``fov_cf/``, ``fov_fa/``, ``mask_TOKEN/`` and a line per pair in ``metadata.jsonl``.

    Files have numbers instead of names, and what was seen is called ``fov``: `datasets` takes words such as ``test``
    or ``valid`` in a path for the name of a split.
    """

    def __init__(self, root: Path, tokens: tuple[str, ...], *, seeds: bool, residuals: bool, patients: bool) -> None:
        self._sink = FolderSink(root)
        self._tokens = tokens
        # Every line has the same columns, so that the first ones tell the types of all.
        known = {"seed": seeds, "residual_px": residuals, "patient": patients}
        self._left_out = {key for key, kept in known.items() if not kept}
        self._lines = (root / "metadata.jsonl").open("w", encoding="utf-8")
        self._entries: list[dict[str, Any]] = []

    def add(self, item: ExportPair) -> None:
        entry: dict[str, Any] = {}
        file = f"{len(self._entries):06d}.png"
        for kind, data in _images(item):
            entry[f"{FOLDERS[kind]}_file_name"] = f"{FOLDERS[kind]}/{file}"
            self.put(f"{FOLDERS[kind]}/{file}", data)
        for token in self._tokens:
            mask = item.masks.get(token)
            entry[f"mask_{token}_file_name"] = None if mask is None else f"mask_{token}/{file}"
            if mask is not None:
                self.put(f"mask_{token}/{file}", _mask_png(mask))
        fields = {"seed": None, "patient": None, **_fields(item)}
        entry |= {key: value for key, value in fields.items() if key not in self._left_out}
        self._lines.write(json.dumps(entry) + "\n")
        self._entries.append(entry)

    def finish(self) -> tuple[str, bytes]:
        self.close()
        index = _index({}, self._entries)
        self.put(PAIRS, index)
        return PAIRS, index

    def put(self, name: str, data: bytes) -> None:
        self._sink.put(name, data)

    def close(self) -> None:
        self._lines.close()


def _index(head: dict[str, Any], entries: list[dict[str, Any]]) -> bytes:
    return (json.dumps({**head, "pairs": entries}, indent=1) + "\n").encode()


def _images(item: ExportPair) -> Iterator[tuple[str, bytes]]:
    """The four images of a pair as PNG."""
    images = item.images
    yield "cf", _png(np.asarray(cv2.cvtColor(images.cf, cv2.COLOR_RGB2BGR)))
    yield "fa", _png(images.fa)
    yield "valid_cf", _mask_png(images.valid_cf)
    yield "valid_fa", _mask_png(images.valid_fa)


def _mask_png(mask: Mask) -> bytes:
    return _png(mask.astype(np.uint8) * 255)


def _png(pixels: Bytes) -> bytes:
    _, encoded = cv2.imencode(".png", pixels)
    return encoded.tobytes()


def _fields(item: ExportPair) -> dict[str, Any]:
    """What is known about a pair, but for its files."""
    fields = asdict(item.pair)
    del fields["masks"]
    if item.pair.patient is None:
        del fields["patient"]
    return fields if item.seed is None else {**fields, "seed": item.seed}
