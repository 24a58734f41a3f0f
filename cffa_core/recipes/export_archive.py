"""Export the pairs of a downloaded archive, or of the folder it was unpacked into, on this machine without a service.

Only what has a manifest is taken: it says that the pairs are generated, and how. Other pairs are those of
``data.export``.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cffa_core.disk_files import sha256_of
from cffa_core.errors import Conflict, CorruptArtifact, InvalidDataset, NotFound, StorageUnavailable
from cffa_core.jobs.spec import ExportSettings
from cffa_core.recipes.archive import MANIFEST, images_of
from cffa_core.recipes.export_pairs import GeneratedPair, export_manifest, export_shards
from cffa_core.recipes.selection import require_gate, selects

OnProgress = Callable[[str, int, int], None]
Read = Callable[[str], bytes]
_OF_THE_ARCHIVE = ("format", "pairs", "exhausted", "selection")


def export_archive(
    path: Path, out: Path, settings: ExportSettings, on_progress: OnProgress | None = None
) -> list[dict[str, Any]]:
    """Export the chosen pairs of the archive at ``path`` into the folder ``out``; return its archives.

    Each has name, number of pairs, size and SHA-256; ``out/manifest.json`` says the same and where the pairs come from.
    The same archive and settings give the same bytes. Raises ``NotFound``, ``InvalidDataset`` if there is no manifest,
    ``InvalidSpec`` for a selection that nothing meets, ``CorruptArtifact``, ``Conflict`` if ``out`` exists, and
    ``StorageUnavailable``; nothing is left behind then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} exists; nothing is written over: name another place or remove it first")
    staging = out.resolve().with_name(f".{out.resolve().name}.partial")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with _opened(path) as (raw, read):
            files = _export(raw, read, staging, settings, on_progress or _silent)
        staging.replace(out.resolve())
    except OSError as error:
        raise StorageUnavailable(f"{out} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return files


def read_manifest(raw: bytes) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and pairs of an archive's manifest; raises ``CorruptArtifact`` if it is not one."""
    try:
        manifest = json.loads(raw)
        if not str(manifest["format"]).startswith("cffa-archive/"):
            raise CorruptArtifact(f"{MANIFEST} is of format {manifest['format']!r}, not that of an archive of pairs")
        for pair in manifest["pairs"]:
            for image in images_of(pair):
                entry = pair[image]
                if entry["name"] != f"{image}/{pair['index']:06d}.png":
                    raise CorruptArtifact(f"{MANIFEST}: {entry['name']!r} is not the name of pair {pair['index']}")
                if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                    raise TypeError(f"size or sha256 of {entry['name']}")
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptArtifact(f"{MANIFEST} is not readable: {error!r}") from error
    header = {key: value for key, value in manifest.items() if key not in _OF_THE_ARCHIVE}
    return header, list(manifest["pairs"])


def read_header(path: Path) -> dict[str, Any]:
    """What the manifest of the archive at ``path`` says of all its pairs; raises as :func:`read_manifest`."""
    with _opened(path) as (raw, _):
        return read_manifest(raw)[0]


def _export(
    raw: bytes, read: Read, folder: Path, settings: ExportSettings, on_progress: OnProgress
) -> list[dict[str, Any]]:
    header, entries = read_manifest(raw)
    require_gate(settings.selection, header.get("spec"))
    chosen = [entry for entry in entries if selects(settings.selection, entry)]

    def pairs() -> Iterator[GeneratedPair]:
        for done, entry in enumerate(chosen, start=1):
            yield GeneratedPair.read(entry, lambda kept: {name: read(kept[name]["name"]) for name in images_of(kept)})
            on_progress("exporting", done, len(chosen))

    files = []
    for shard in export_shards(pairs(), settings, header, folder):
        size = shard.path.stat().st_size
        files.append({"name": shard.path.name, "pairs": shard.pairs, "size": size, "sha256": sha256_of(shard.path)})
    source = {"manifest_sha256": hashlib.sha256(raw).hexdigest(), "pairs": len(entries)}
    (folder / MANIFEST).write_text(export_manifest(settings, header, source, files), encoding="utf-8")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[tuple[bytes, Read]]:
    """The manifest and a reader of files by name, of a zip or a folder."""
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise _without_manifest(path)
        yield (path / MANIFEST).read_bytes(), lambda name: _read_file(path / name)
        return
    if not path.is_file():
        raise NotFound(f"{path} does not exist")
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CorruptArtifact(f"{path.name} is not a readable zip archive: {error}") from error
    with archive:
        if MANIFEST not in archive.namelist():
            raise _without_manifest(path)
        yield _read_member(archive, MANIFEST), lambda name: _read_member(archive, name)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CorruptArtifact(f"{path.name}, which {MANIFEST} names, is not there") from error


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CorruptArtifact(f"{name}, which {MANIFEST} names, cannot be read: {error}") from error


def _without_manifest(path: Path) -> InvalidDataset:
    return InvalidDataset(
        f"{path} has no {MANIFEST}, so nothing says that its pairs are generated; name an archive that a generation "
        "job made, or use cffa dataset export"
    )


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
