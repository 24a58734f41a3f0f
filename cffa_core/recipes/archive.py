"""Zip archives of generated pairs: written, merged, verified; the same pairs and header give the same bytes.

Members are stored (PNG does not deflate), in index order (``cf/000000.png``, ``fa/000000.png``, ...), with fixed
timestamps and attributes, and ``manifest.json`` last. The manifest carries the header it was given
(`recipes.provenance`), and per pair index, seed, try, scores, and size and SHA-256 of its images; ids, object keys,
attempts and clock times never enter. An edited pair has two images more, right behind its CF and FA: the mask of the
edit (``mask/000017.png``), and before and after side by side (``sheet/000017.png``). Pixels stream through; what grows
with the number of pairs is one small directory entry each. Nothing here knows jobs or storage.

Pairs that a gate refused have an archive of the same kind, ``cffa-rejects/1``, in which a slot may come several times:
``cf/000017.try00.png``.
"""

from __future__ import annotations

import hashlib
import json
import struct
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cffa_core.disk_files import sha256_of
from cffa_core.errors import CorruptArtifact

FORMAT = "cffa-archive/2"
FORMATS = ("cffa-archive/1", FORMAT)
REJECTS_FORMAT = "cffa-rejects/1"
MANIFEST = "manifest.json"
REJECTS = "rejects"
MODALITIES = ("cf", "fa")
EXTRAS = ("mask", "sheet")

_CHUNK = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_FILE_MODE = 0o100644 << 16
_UNIX = 3
_LOCAL_HEADER = 30
_CENTRAL_HEADER = 46
_ENDINGS = (22, 98)  # end of central directory, without and with its zip64 form


def reject_stem(index: int, attempt: int) -> str:
    """Name, without folder and ending, of the files of a refused pair."""
    return f"{index:06d}.try{attempt:02d}"


def images_of(pair: Mapping[str, Any]) -> tuple[str, ...]:
    """Which images a pair's entry names, in archive order: ``cf`` and ``fa``; of an edited pair ``mask``, ``sheet``."""
    return MODALITIES + tuple(extra for extra in EXTRAS if extra in pair)


def write_part_archive(
    folder: Path, zip_path: Path, header: Mapping[str, Any] | None = None, *, rejects: bool = False
) -> dict[str, Any]:
    """Archive one part folder, as ``generate_part`` leaves it; return its index.

    The index is ``{"size", "sha256", "pairs": [...], "exhausted": [...]}`` of the zip, each pair as in ``part.json``
    with, per image, ``name``, ``offset``, ``size`` and ``sha256``: the image is the byte range
    ``offset .. offset + size - 1`` of the zip. With ``rejects`` the folder is that of the pairs that were refused.
    Raises ``CorruptArtifact`` if a file is missing or is not what ``part.json`` says.
    """
    pairs, empty = _read_pairs((folder / "part.json").read_bytes(), "part.json", rejects=rejects)
    with _new_archive(zip_path) as archive:
        for entry in _files(pairs):
            path = folder / entry["name"]
            if not path.is_file():
                raise CorruptArtifact(f"part.json names {entry['name']}, which is not in the part's folder")
            with path.open("rb") as source:
                _copy_member(archive, entry, source, "part.json")
        _write_manifest(archive, header or {}, (_line(pair) for pair in pairs), empty, rejects=rejects)
    offsets = {name: offset for name, offset, _ in _member_ranges(zip_path)}
    indexed = [
        {**pair, **{image: {**pair[image], "offset": offsets[pair[image]["name"]]} for image in images_of(pair)}}
        for pair in pairs
    ]
    found = {"size": zip_path.stat().st_size, "sha256": sha256_of(zip_path), "pairs": indexed}
    return found if rejects else found | {"exhausted": empty}


def merge_archives(part_zips: Iterable[Path], zip_path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Join part archives, in the order given, into one of the whole job; return ``{"pairs", "exhausted", "manifest"}``.

    ``part_zips`` may be a generator that fetches each part when asked and removes it afterwards: a part is read once.
    ``pairs`` is their number, ``exhausted`` lists the slots that stayed empty, ``manifest`` is name, offset, size and
    SHA-256 of the new manifest. Every image is checked against its part's manifest on the way. Raises
    ``CorruptArtifact`` if bytes differ or indices do not rise.
    """
    count, last = 0, -1
    empty: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", dir=zip_path.parent) as lines,
        _new_archive(zip_path) as archive,
    ):
        for part_zip in part_zips:
            with _opened(part_zip) as part:
                listed, unfilled = _read_pairs(_member_bytes(part, MANIFEST, part_zip), f"manifest of {part_zip.name}")
                empty += unfilled
                for pair in listed:
                    if pair["index"] <= last:
                        raise CorruptArtifact(f"{part_zip.name}: pair {pair['index']} comes after pair {last}")
                    for entry in _files([pair]):
                        with _member(part, entry["name"], part_zip) as source:
                            _copy_member(archive, entry, source, part_zip.name)
                    lines.write(_line(pair) + "\n")
                    count, last = count + 1, pair["index"]
        lines.seek(0)
        manifest = _write_manifest(archive, header, (line.rstrip("\n") for line in lines), empty)
    offset = next(offset for name, offset, _ in _member_ranges(zip_path) if name == MANIFEST)
    return {"pairs": count, "exhausted": empty, "manifest": {**manifest, "offset": offset}}


def verify_archive(path: Path) -> dict[str, Any]:
    """Check an archive of pairs completely; return its manifest.

    Every image the manifest names must be there with the right size and SHA-256, in order, and nothing else may be in
    the file: no further member, no bytes before, between or behind members. Raises ``CorruptArtifact`` otherwise.
    """
    with _opened(path) as archive:
        raw = _member_bytes(archive, MANIFEST, path)
        rejects = _is_rejects(raw, path.name)
        pairs, _ = _read_pairs(raw, f"manifest of {path.name}", rejects=rejects)
        expected = [entry["name"] for entry in _files(pairs)] + [MANIFEST]
        names = archive.namelist()
        if names != expected:
            odd = sorted(set(names) ^ set(expected)) or ["the order of members"]
            raise CorruptArtifact(f"{path.name}: the manifest and the members differ: {', '.join(odd[:5])}")
        for entry in _files(pairs):
            with _member(archive, entry["name"], path) as source:
                _verify(source, entry, path.name)
    _refuse_stowaways(path)
    manifest: dict[str, Any] = json.loads(raw)
    return manifest


def _files(pairs: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The image entries of ``pairs`` in archive order."""
    for pair in pairs:
        for image in images_of(pair):
            yield pair[image]


def _is_rejects(raw: bytes, where: str) -> bool:
    """Whether a manifest is that of refused pairs; raises ``CorruptArtifact`` for a format not known here."""
    try:
        named = json.loads(raw).get("format")
    except (ValueError, AttributeError) as error:
        raise CorruptArtifact(f"manifest of {where} is not readable: {error}") from error
    if named not in (*FORMATS, REJECTS_FORMAT):
        raise CorruptArtifact(f"manifest of {where} is of format {named!r}; known are {', '.join(FORMATS)}")
    return bool(named == REJECTS_FORMAT)


def _read_pairs(raw: bytes, what: str, *, rejects: bool = False) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Pairs and exhausted slots of a part.json or manifest; each entry must have the fields and the name it must have.

    Manifests of before (``cffa-archive/1``) know no exhausted slots.
    """
    try:
        document = json.loads(raw)
        pairs, empty = document["pairs"], document.get("exhausted", [])
        if not isinstance(empty, list):
            raise TypeError("exhausted is not a list")
        for pair in pairs:
            stem = reject_stem(pair["index"], pair["try"]) if rejects else f"{pair['index']:06d}"
            for image in images_of(pair):
                entry = pair[image]
                if entry["name"] != f"{image}/{stem}.png":
                    raise CorruptArtifact(f"{what}: {entry['name']!r} is not the name of pair {pair['index']}")
                if not isinstance(entry["size"], int) or not isinstance(entry["sha256"], str):
                    raise TypeError(f"size or sha256 of {entry['name']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{what} is not readable: {error}") from error
    return pairs, empty


def without_places(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair's entry as a manifest has it: a zip offset, if any, is a matter of one zip and stays out."""
    return {**pair, **{image: {k: v for k, v in pair[image].items() if k != "offset"} for image in images_of(pair)}}


def _line(pair: Mapping[str, Any]) -> str:
    """One pair as one line of a manifest."""
    return json.dumps(without_places(pair), sort_keys=True, separators=(",", ":"))


@contextmanager
def _new_archive(zip_path: Path) -> Iterator[zipfile.ZipFile]:
    """An archive that gets its name only when it is complete."""
    partial = zip_path.with_name(f"{zip_path.name}.partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
            yield archive
        partial.replace(zip_path)
    finally:
        partial.unlink(missing_ok=True)


def _new_member(name: str, size: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.create_system = _UNIX
    member.external_attr = _FILE_MODE
    member.file_size = size
    return member


def _copy_member(archive: zipfile.ZipFile, entry: Mapping[str, Any], source: IO[bytes], where: str) -> None:
    with archive.open(_new_member(entry["name"], entry["size"]), "w") as target:
        _verify(source, entry, where, target)


def _verify(source: IO[bytes], entry: Mapping[str, Any], where: str, target: IO[bytes] | None = None) -> None:
    """Read ``source`` to its end, checking size and digest; copy to ``target``, if given, on the way."""
    digest, size = hashlib.sha256(), 0
    try:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
            if target is not None and size <= entry["size"]:
                target.write(chunk)
    except zipfile.BadZipFile as error:
        raise CorruptArtifact(f"{where}: {entry['name']}: {error}") from error
    if size != entry["size"] or digest.hexdigest() != entry["sha256"]:
        raise CorruptArtifact(f"{where}: {entry['name']} does not have the recorded size and sha256")


def _write_manifest(
    archive: zipfile.ZipFile,
    header: Mapping[str, Any],
    lines: Iterable[str],
    empty: Sequence[Mapping[str, Any]],
    *,
    rejects: bool = False,
) -> dict[str, Any]:
    """Write manifest.json: the header's fields one per line, sorted, then one pair per line. Return its entry."""
    if clash := {"format", "pairs", "exhausted"} & set(header):
        raise ValueError(f"the header may not carry {', '.join(sorted(clash))}")
    fields = {"format": REJECTS_FORMAT, **header} if rejects else {"format": FORMAT, "exhausted": empty, **header}
    digest, size = hashlib.sha256(), 0
    with archive.open(_new_member(MANIFEST, 0), "w") as target:
        for chunk in _manifest_chunks(fields, lines):
            raw = chunk.encode()
            digest.update(raw)
            size += len(raw)
            target.write(raw)
    return {"name": MANIFEST, "size": size, "sha256": digest.hexdigest()}


def _manifest_chunks(fields: Mapping[str, Any], lines: Iterable[str]) -> Iterator[str]:
    yield "{\n"
    for key in sorted(fields):
        yield f"{json.dumps(key)}: {json.dumps(fields[key], sort_keys=True)},\n"
    yield '"pairs": ['
    separator = "\n"
    for line in lines:
        yield f"{separator}{line}"
        separator = ",\n"
    yield "\n]\n}\n"


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise CorruptArtifact(f"{path.name} is not a readable zip archive: {error}") from error


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> IO[bytes]:
    """Open a stored, plain member; anything else was not written here."""
    try:
        info = archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 0x1:
            raise CorruptArtifact(f"{path.name}: {name} is compressed or encrypted")
        return archive.open(info)
    except (KeyError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CorruptArtifact(f"{path.name}: {name} cannot be read: {error}") from error


def _member_bytes(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    with _member(archive, name, path) as member:
        try:
            return member.read()
        except zipfile.BadZipFile as error:
            raise CorruptArtifact(f"{path.name}: {name}: {error}") from error


def _member_ranges(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, first byte and size of each member's data, in the order they stand in the file."""
    with _opened(path) as archive, path.open("rb") as raw:
        for info in sorted(archive.infolist(), key=lambda member: member.header_offset):
            raw.seek(info.header_offset)
            head = raw.read(_LOCAL_HEADER)
            if len(head) < _LOCAL_HEADER:
                raise CorruptArtifact(f"{path.name}: {info.filename} has no header")
            name_length, extra_length = struct.unpack("<HH", head[26:30])
            yield info.filename, info.header_offset + _LOCAL_HEADER + name_length + extra_length, info.compress_size


def _refuse_stowaways(path: Path) -> None:
    """Raise ``CorruptArtifact`` if bytes stand in the file that belong to no member and no directory."""
    end = 0
    with _opened(path) as archive:
        entries = archive.infolist()
        ranges = list(_member_ranges(path))
        for info, (name, offset, size) in zip(
            sorted(entries, key=lambda member: member.header_offset), ranges, strict=True
        ):
            if info.header_offset != end or info.comment:
                raise CorruptArtifact(f"{path.name}: there are foreign bytes at {name}")
            end = offset + size
        directory = sum(
            _CENTRAL_HEADER + len(info.orig_filename.encode()) + len(info.extra) + len(info.comment) for info in entries
        )
    if path.stat().st_size - end - directory not in _ENDINGS:
        raise CorruptArtifact(f"{path.name}: there are foreign bytes behind the last member")
