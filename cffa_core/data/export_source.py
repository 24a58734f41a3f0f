"""What an export reads: the pairs of any source with their masks, and what is recorded about where they came from.

Images come through the same check as an upload; an archive of generated pairs is believed only where the SHA-256 of its
manifest fits the file. Pixels pass one pair at a time. Knows no output format and no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from cffa_core.data.captions import captions_text, read_captions
from cffa_core.data.contracts import MASK_FOLDERS, CheckedPair, Limits, Mask, PairImages
from cffa_core.data.dataset_folder import INDEX, SAFE, is_dataset_folder
from cffa_core.data.decoding import Decoder, Refused
from cffa_core.data.ingest import check, open_pairs
from cffa_core.data.layouts import wrapper
from cffa_core.data.sources import Source, open_source
from cffa_core.errors import CorruptArtifact, InvalidDataset, InvalidSpec, Problem

MANIFEST, ARCHIVE_FORMATS = "manifest.json", ("cffa-archive/1", "cffa-archive/2")
NOT_STATED = "not stated"
OriginKind = Literal["real", "generated", "procedural"]


@dataclass(frozen=True)
class ExportPair:
    """One pair on its way out: ``masks[token] (H, W)`` bool on the pair's grid, ``seed`` of a generated pair."""

    pair: CheckedPair
    images: PairImages
    masks: Mapping[str, Mask]
    seed: int | None


@dataclass(frozen=True)
class PairFiles:
    """Where one pair lies in its source: the CF and FA as they came, and by token the masks that the check leaves."""

    cf: str
    fa: str
    masks: dict[str, str]


@dataclass
class ExportSource:
    """A checked source. ``origin`` is JSON-ready: ``kind`` and, for generated pairs, spec and model digest.

    ``masks_left_out`` names mask files that belong to no pair; ``captions`` is the text of captions.jsonl, or empty.
    """

    digest: str
    pairs: list[CheckedPair]
    origin: dict[str, Any]
    tokens: tuple[str, ...]
    masks_left_out: tuple[str, ...]
    captions: str
    _decoded: Iterator[tuple[CheckedPair, PairImages]]
    _source: Source
    _decoder: Decoder
    _files: dict[str, PairFiles]
    _recorded: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def has_seeds(self) -> bool:
        """True if the source records a seed per pair."""
        return any("seed" in entry for entry in self._recorded.values())

    def read(self) -> Iterator[ExportPair]:
        """Each pair with its pixels and masks, one at a time.

        Raises ``CorruptArtifact`` for a generated image that is not what its manifest says, ``InvalidDataset`` for a
        mask that cannot be used.
        """
        for pair, images in self._decoded:
            files = self._files[pair.name]
            entry = self._recorded.get(pair.name, {})
            self._verify(files, entry)
            masks = {**images.masks, **self._masks(pair, files)}
            yield ExportPair(pair, images, masks, entry.get("seed"))

    def _verify(self, files: PairFiles, entry: Mapping[str, Any]) -> None:
        for modality, name in (("cf", files.cf), ("fa", files.fa)):
            expected = entry.get(modality)
            if isinstance(expected, Mapping):
                data = self._source.read(name)
                if isinstance(data, Problem) or hashlib.sha256(data).hexdigest() != expected.get("sha256"):
                    raise CorruptArtifact(
                        f"{name} is not the image that {MANIFEST} describes; download the archive again, or remove "
                        f"{MANIFEST} to export the pairs without their origin"
                    )

    def _masks(self, pair: CheckedPair, files: PairFiles) -> dict[str, Mask]:
        masks: dict[str, Mask] = {}
        problems: list[Problem] = []
        for token, name in sorted(files.masks.items()):
            if token in pair.masks:
                continue
            data = self._source.read(name)
            decoded = data if isinstance(data, Problem) else self._decoder.decode(data)
            if isinstance(decoded, Problem):
                problems.append(decoded)
            elif isinstance(decoded, Refused):
                problems.append(Problem(name, decoded.code, decoded.message))
            elif decoded.pixels.shape[:2] != (pair.height, pair.width):
                height, width = decoded.pixels.shape[:2]
                message = f"the mask is {width}x{height}, its pair {pair.width}x{pair.height} pixels; draw it on the CF"
                problems.append(Problem(name, "mask_size", message))
            else:
                pixels = decoded.pixels if decoded.pixels.ndim == 2 else decoded.pixels.max(axis=2)
                masks[token] = pixels > 127
        if problems:
            raise InvalidDataset(f"the masks of pair {pair.name} cannot be used", problems=tuple(problems))
        return masks


@contextmanager
def open_export(
    path: Path,
    *,
    origin: OriginKind | None = None,
    eye_pattern: str | None = None,
    limits: Limits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[ExportSource]:
    """Check the folder, zip, archive or checked data set at ``path`` and open it for :meth:`ExportSource.read`.

    ``origin`` says where the pairs come from if the source does not record it. Raises ``NotFound``, ``InvalidDataset``
    with all problems, ``CorruptArtifact`` for an unreadable manifest, ``InvalidSpec`` if ``origin`` contradicts it.
    """
    limits = limits or Limits()
    digest, pairs, decoded, originals, captions = _pairs(path, eye_pattern, limits, on_progress)
    with open_source(path, limits) as source, Decoder(limits) as decoder:
        prefix = wrapper(source.names)
        found = _mask_files(source, prefix)
        files = {
            pair.name: PairFiles(cf, fa, found.pop(stem, {}))
            for pair, (cf, fa, stem) in zip(pairs, originals, strict=True)
        }
        recorded, entries = _records(source, prefix)
        strangers = [pair.name for pair in pairs if pair.name not in entries]
        if strangers and any("cf" in entry for entry in entries.values()):
            raise CorruptArtifact(
                f"{MANIFEST} does not name {', '.join(strangers[:5])}; export generated and other pairs separately"
            )
        if origin is not None and recorded.setdefault("kind", origin) != origin:
            message = f"the pairs are recorded as {recorded['kind']}, not as {origin}"
            raise InvalidSpec(message, problems=(Problem("/origin", "contradiction", message),))
        recorded.setdefault("kind", NOT_STATED)
        yield ExportSource(
            digest=digest,
            pairs=pairs,
            origin=recorded,
            tokens=tuple(sorted({token for pair in pairs for token in (*pair.masks, *files[pair.name].masks)})),
            masks_left_out=tuple(sorted(name for masks in found.values() for name in masks.values())),
            captions=captions,
            _decoded=decoded,
            _source=source,
            _decoder=decoder,
            _files=files,
            _recorded=entries,
        )


def _pairs(
    path: Path, eye_pattern: str | None, limits: Limits, on_progress: Callable[[int, int], None] | None
) -> tuple[str, list[CheckedPair], Iterator[tuple[CheckedPair, PairImages]], list[tuple[str, str, str]], str]:
    """Digest, pairs, pixels, per pair its files and the name that its masks have, and the captions."""
    if is_dataset_folder(path):
        digest, pairs, decoded = open_pairs(path, eye_pattern=eye_pattern)
        captions = captions_text(read_captions(path), [pair.name for pair in pairs])
        return digest, pairs, decoded, [(f"cf/{p.name}.png", f"fa/{p.name}.png", p.name) for p in pairs], captions
    checked = check(path, limits, eye_pattern=eye_pattern, on_progress=on_progress)
    if not checked.ok:
        count = len(checked.problems)
        raise InvalidDataset(f"{path}: {count} problem(s), nothing was exported", problems=checked.problems)
    originals = [
        (c.cf, c.fa, PurePosixPath(c.cf).stem if checked.layout == "folders" else c.name) for c in checked.candidates
    ]
    return checked.digest, list(checked.pairs), checked.decoded(), originals, checked.captions_text


def _mask_files(source: Source, prefix: str) -> dict[str, dict[str, str]]:
    """Mask files ``masks/TOKEN/NAME.*`` as ``{NAME: {TOKEN: file}}``, but for those that come with the pair itself."""
    found: dict[str, dict[str, str]] = {}
    for name in source.names:
        parts = PurePosixPath(name.removeprefix(prefix)).parts
        known = len(parts) == 3 and parts[0].lower() == "masks" and SAFE.fullmatch(parts[1]) is not None
        if known and parts[1].lower() not in MASK_FOLDERS:
            found.setdefault(PurePosixPath(parts[2]).stem, {})[parts[1]] = name
    return found


def _records(source: Source, prefix: str) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]]]:
    """Origin of the set and entry of each pair, from an archive's manifest or an earlier export's index."""
    manifest = _read_object(source, prefix + MANIFEST)
    index = _read_object(source, prefix + INDEX)
    entries: dict[str, Mapping[str, Any]] = {}
    try:
        if manifest.get("format") in ARCHIVE_FORMATS:
            for entry in manifest["pairs"]:
                kept = {m: {"sha256": entry[m]["sha256"]} for m in ("cf", "fa")}
                entries[PurePosixPath(entry["cf"]["name"]).stem] = {"seed": int(entry["seed"]), **kept}
            header = {key: value for key, value in manifest.items() if key not in ("format", "pairs", "exhausted")}
            return {"kind": "generated", **header}, entries
        if isinstance(index.get("origin"), dict):
            for entry in index["pairs"]:
                if "seed" in entry:
                    entries[str(entry["name"])] = {"seed": int(entry["seed"])}
            return {k: v for k, v in index["origin"].items() if (k, v) != ("kind", NOT_STATED)}, entries
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptArtifact(f"{MANIFEST} or {INDEX} of the source is not readable: {error!r}") from error
    return {}, {}


def _read_object(source: Source, name: str) -> dict[str, Any]:
    """A JSON object among the files of the source; empty if it is absent or something else."""
    data = source.read(name) if name in source.names else b""
    if isinstance(data, Problem):
        raise CorruptArtifact(f"{data.pointer}: {data.message}")
    try:
        content = json.loads(data) if data else {}
    except ValueError:
        content = {}
    return content if isinstance(content, dict) else {}
