"""Export of pairs in the forms that others read: a folder, a zip, WebDataset shards, an image folder for `datasets`.

One pass over the source, one pair in memory at a time; every form carries Croissant JSON-LD and a data card. What is
written appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

from cffa_core.data.contracts import Limits
from cffa_core.data.dataset_folder import CAPTIONS, KINDS
from cffa_core.data.export_card import CARD, CROISSANT, FIELDS, Images, Summary, card, croissant
from cffa_core.data.export_layouts import FOLDERS, Files, FolderSink, ImageFolder, Shards, Writer, ZipSink
from cffa_core.data.export_source import ExportSource, OriginKind, open_export
from cffa_core.errors import Conflict, InvalidSpec, Problem, StorageUnavailable

ExportFormat = Literal["folder", "zip", "webdataset", "imagefolder"]
# An export is somebody's own wish on somebody's own machine; an upload is not, and has smaller limits.
LIMITS = Limits(max_members=1_000_000, max_total_bytes=2**44, max_total_pixels=10**14)
OnProgress = Callable[[str, int, int], None]
FILES = """\
`cf/NAME.png`, `fa/NAME.png`: the images. `valid_cf/`, `valid_fa/`: what each camera saw. `masks/TOKEN/NAME.png`:
annotations, where there are any. `dataset.json`: one entry per pair. `eyes.csv`: which pair belongs to which eye
(and patient, if known).
`captions.jsonl`: what is said of each pair, where anything is.
`croissant.json`: all this for programs. CFFA reads the folder as it is, and zipped: `cffa train`, `load_pairs`."""
CONTENTS = {
    "folder": FILES,
    "zip": FILES,
    "webdataset": """\
`cffa-000000.tar` ...: per pair `KEY.cf.png`, `KEY.fa.png`, `KEY.valid_cf.png` and `KEY.valid_fa.png` (what each camera
saw), `KEY.mask_TOKEN.png` (annotations, where there are any) and `KEY.json`. `pairs.json`: key, shard and description
of every pair. `croissant.json`: all this for programs.

    webdataset.WebDataset("cffa-{000000..000003}.tar", shardshuffle=False).decode("pil")""",
    "imagefolder": """\
`metadata.jsonl`: one line per pair. `cf/`, `fa/`: the images. `fov_cf/`, `fov_fa/`: what each camera saw.
`mask_TOKEN/`: annotations, where there are any. `pairs.json`, `croissant.json`: the same for programs.

    datasets.load_dataset("imagefolder", data_dir="...", split="train")""",
}


def export_pairs(
    path: Path,
    out: Path,
    kind: ExportFormat,
    *,
    title: str = "CF-FA pairs",
    licence: str | None = None,
    origin: OriginKind | None = None,
    shard_pairs: int = 256,
    eye_pattern: str | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Export the folder, zip, archive of generated pairs or checked data set at ``path`` to ``out``; return a report.

    ``licence`` is stated if given and never invented; ``origin`` says whether pairs are real, generated or procedural
    where the source does not record it. Equal pairs and options give equal bytes. Raises ``NotFound``,
    ``InvalidDataset`` with all problems, ``InvalidSpec``, ``CorruptArtifact``, ``Conflict`` if ``out`` exists, and
    ``StorageUnavailable``; nothing is left behind then.
    """
    if kind not in CONTENTS:
        raise no_such_form(kind)
    if shard_pairs < 1:
        raise InvalidSpec(
            "a shard holds at least one pair", problems=(Problem("/shard_pairs", "too_small", "below 1"),)
        )
    _refuse(path, out)
    said = on_progress or _silent
    with (
        open_export(
            path,
            origin=origin,
            eye_pattern=eye_pattern,
            limits=LIMITS,
            on_progress=lambda done, total: said("checking", done, total),
        ) as source,
        _staging(out) as place,
    ):
        summary = Summary(title, kind, source.digest, source.origin, licence)
        with closing(_writer(kind, place, source, shard_pairs)) as writer:
            for number, item in enumerate(source.read()):
                writer.add(item)
                summary.add(item)
                said("writing", number + 1, len(source.pairs))
            index = writer.finish()
            if source.captions:
                writer.put(CAPTIONS, source.captions.encode())
            writer.put(CROISSANT, _croissant(summary, source, writer, index))
            writer.put(CARD, card(summary, CONTENTS[kind]))
        return {"out": str(out), **summary.report(), "masks_left_out": list(source.masks_left_out)}


def no_such_form(kind: str) -> InvalidSpec:
    """The refusal of a form that pairs of any origin cannot have; of DICOM with the reason."""
    message = f"{kind!r} is no form of a data set; take {', '.join(CONTENTS)}"
    if kind == "dicom":
        message = (
            "DICOM is written of generated pairs alone (cffa export JOB|ARCHIVE --form dicom). These pairs may show a "
            "patient, and name, side of the eye, date and camera would have to be invented: take them from the studies "
            "that the pairs come from, or another form"
        )
    return InvalidSpec(
        message, problems=(Problem("/format", "not_synthetic" if kind == "dicom" else "unknown", message),)
    )


def _writer(kind: ExportFormat, place: Path, source: ExportSource, shard_pairs: int) -> Writer:
    if kind == "zip":
        return Files(ZipSink(place), source.digest, source.origin)
    place.mkdir()
    if kind == "webdataset":
        return Shards(place, shard_pairs)
    if kind == "imagefolder":
        residuals = any(pair.residual_px is not None for pair in source.pairs)
        patients = any(pair.patient is not None for pair in source.pairs)
        return ImageFolder(place, source.tokens, seeds=source.has_seeds, residuals=residuals, patients=patients)
    return Files(FolderSink(place), source.digest, source.origin)


def _croissant(summary: Summary, source: ExportSource, writer: Writer, index: tuple[str, bytes]) -> bytes:
    """The Croissant document: where each form keeps which images, and how a file tells its pair."""
    masks = [f"mask_{token}" for token in source.tokens]
    if isinstance(writer, Shards):
        shards = {shard.name: _file_sha(shard) for shard in writer.shards}
        images = [Images(k, f"*.{k}.png", _file_name(r"^([^.]+)(?:\.[^.]+\.png)?$"), "key") for k in [*KINDS, *masks]]
        return croissant(summary, index, {"key": "sc:Text", **FIELDS}, images, archives=shards)
    if isinstance(writer, ImageFolder):
        whole = {"extract": {"fileProperty": "fullpath"}}
        folders = [*FOLDERS.values(), *masks]
        images = [Images(f, f"{f}/*.png", whole, f"{f}_file_name") for f in folders]
        return croissant(summary, index, {**FIELDS, **{f"{f}_file_name": "sc:Text" for f in folders}}, images)
    places = {kind: kind for kind in KINDS} | {f"mask_{token}": f"masks/{token}" for token in source.tokens}
    named = _file_name(r"^(.+?)(?:\.png)?$")
    return croissant(summary, index, FIELDS, [Images(k, f"{f}/*.png", named, "name") for k, f in places.items()])


def _file_name(regex: str) -> dict[str, Any]:
    """The part of a file's name in parentheses; the pattern takes its own result too, since readers apply it twice."""
    return {"extract": {"fileProperty": "filename"}, "transform": {"regex": regex}}


def _refuse(path: Path, out: Path) -> None:
    """Nothing is written over, and nothing into the source itself."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise Conflict(f"{out} exists; nothing is written over: name another place or remove it first")
    if path.is_dir() and out.resolve().is_relative_to(path.resolve()):
        raise Conflict(f"{out} lies inside {path}, which is exported; name a place outside of it")


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A path beside ``out`` that gets its name if the block ends well, and vanishes if it does not."""
    out = out.resolve()
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            _remove(partial)
            yield partial
            if out.is_dir() and not partial.is_dir():
                out.rmdir()  # an empty folder may be replaced, here by a zip
            partial.replace(out)
        finally:
            _remove(partial)
    except OSError as error:
        raise StorageUnavailable(f"{out} cannot be written: {error.strerror or error}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _file_sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody asked for."""
