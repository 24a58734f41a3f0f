"""The two units of a job whose product is a report: compute it and store its files, then say what was stored.

This runs in the child, called by ``execute``, for attention and captioned jobs; an evaluation stores and finishes its
report with the same two functions. What is computed, and how, is the matter of the recipes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import AttentionSpec, CaptionedSpec, EvaluationSpec
from cffa_core.storage.base import ObjectInfo, ObjectStore, result_key
from services.worker.job_context import UnitContext
from services.worker.protocol import Done, WorkOrder

REPORT = "report.json"
IMAGES = "images"
_SOME_DAY = (1980, 1, 1, 0, 0, 0)


def compute_attention(
    order: WorkOrder,
    spec: AttentionSpec,
    model: Path,
    base: str,
    context: UnitContext,
    objects: ObjectStore,
    device: str,
    models_dir: Path | None,
) -> Done:
    """Look into the sampling of one pair; store the report, the maps and the pictures."""
    from cffa_core.recipes.attention import capture_attention

    out = _out(order)
    capture_attention(spec.settings(), model, base, out, context.progress, device=device, models_dir=models_dir)
    return _stored(order, out, context, objects)


def compute_captioned(
    order: WorkOrder,
    spec: CaptionedSpec,
    model: Path,
    dataset: Path | None,
    context: UnitContext,
    objects: ObjectStore,
    device: str,
) -> Done:
    """Draw texts or caption images; store the report, and the images (one archive of them) or the captions."""
    from cffa_core.recipes.captioned import run_captioned

    out = _out(order)
    run_captioned(spec.settings(), model, dataset, out, context.progress, device=device)
    _pack_images(out, lambda done, total: context.progress("packing", done, total))
    return _stored(order, out, context, objects)


def store_report(order: WorkOrder, out: Path, context: UnitContext, objects: ObjectStore) -> StoredFiles:
    """Store every file below ``out`` under its path there."""
    files: dict[str, ObjectInfo] = {}
    paths = [path for path in sorted(out.rglob("*")) if path.is_file()]
    for done, path in enumerate(paths, start=1):
        name = path.relative_to(out).as_posix()
        files[name] = objects.put_file(result_key(order.job_id, order.kind, order.attempt, name), path)
        context.progress("storing", done, len(paths))
    return StoredFiles(files)


def finish_report(
    order: WorkOrder,
    spec: EvaluationSpec | AttentionSpec | CaptionedSpec,
    products: StoredFiles,
    facts: Mapping[str, Any],
    objects: ObjectStore,
) -> Done:
    """Write the manifest: the settings, ``facts`` on the inputs, size and SHA-256 of every file of the report."""
    if REPORT not in products.files:
        raise CorruptArtifact(f"the {spec.kind} left no {REPORT}")
    files = {name: {"size": info.size, "sha256": info.sha256} for name, info in sorted(products.files.items())}
    manifest = {
        "format": f"cffa-{spec.kind}-job/1",
        "spec": spec.settings().model_dump(mode="json"),
        **facts,
        "numerics_key": order.numerics_key,
        "files": files,
    }
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    key = result_key(order.job_id, order.kind, order.attempt, "manifest.json")
    listing = objects.put_bytes(key, text.encode())
    return Done(
        stored=StoredFiles({"manifest.json": listing}),
        info={"files": len(files)},
        job_result={"report": files[REPORT], "files": len(files), "manifest": {"sha256": listing.sha256}},
    )


def _out(order: WorkOrder) -> Path:
    out = Path(order.folder) / "report"
    out.mkdir()
    return out


def _stored(order: WorkOrder, out: Path, context: UnitContext, objects: ObjectStore) -> Done:
    return Done(stored=store_report(order, out, context, objects), info={"inputs": order.facts["inputs"]})


def _pack_images(out: Path, on_file: Callable[[int, int], None]) -> None:
    """Put ``images/`` into one ``images.zip``: there may be thousands. The same images give the same bytes."""
    folder = out / IMAGES
    if not folder.is_dir():
        return
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    with ZipFile(out / f"{IMAGES}.zip", "w", ZIP_STORED) as archive:
        for done, path in enumerate(paths, start=1):
            archive.writestr(ZipInfo(path.relative_to(out).as_posix(), _SOME_DAY), path.read_bytes())
            on_file(done, len(paths))
    shutil.rmtree(folder)
