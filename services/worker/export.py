"""The two units of an export job: write the archives, one at a time, then say what they hold.

This runs in the child, called by ``execute``. Which pairs, and in what form, is the matter of the recipe; they are
read as byte ranges of the archives of their parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import ExportSpec
from cffa_core.storage.base import ObjectInfo, ObjectStore, result_key
from services.worker.generated_pairs import listed, part_objects, read_images
from services.worker.protocol import Done, WorkOrder
from services.worker.scratch import files_digest
from services.worker.tracked import Tracked

if TYPE_CHECKING:
    from cffa_core.recipes.export_pairs import GeneratedPair

STAGE = "exporting"
MANIFEST = "manifest.json"


def export(order: WorkOrder, spec: ExportSpec, context: JobContext, objects: ObjectStore) -> Done:
    """Write and store the archives; on this machine there is never more than one of them."""
    from cffa_core.recipes.export_pairs import GeneratedPair, export_shards
    from cffa_core.recipes.selection import selects

    folder = Path(order.folder)
    parts = part_objects(order.inputs["parts"])
    if not parts:
        raise CorruptArtifact("the parts that are to be exported have no files")
    header = _header(objects, parts[0][0], folder)
    done = 0

    def chosen() -> Iterator[GeneratedPair]:
        nonlocal done
        for done, (archive, listing) in enumerate(parts):
            context.progress(STAGE, done, len(parts))
            for entry in listed(objects, listing):
                if selects(spec.selection, entry):
                    yield GeneratedPair.read(entry, partial(read_images, objects, archive))
                    context.progress(STAGE, done, len(parts))

    files: dict[str, ObjectInfo] = {}
    told: list[dict[str, Any]] = []
    for shard in export_shards(chosen(), spec.settings(), header, folder):
        name = shard.path.name
        # Under the same stage: the time left is measured over the whole unit.
        with Tracked(shard.path, lambda sent, size: context.progress(STAGE, done, len(parts))) as stream:
            files[name] = objects.put_stream(result_key(order.job_id, order.kind, order.attempt, name), stream)
        shard.path.unlink()
        told.append({"name": name, "pairs": shard.pairs, "size": files[name].size, "sha256": files[name].sha256})
    context.progress(STAGE, len(parts), len(parts))
    zips = StoredFiles({f"{number:05d}": archive for number, (archive, _) in enumerate(parts)})
    source = {"parts": len(parts), "sha256": files_digest(zips)}
    return Done(stored=StoredFiles(files), info={"files": told, "header": header, "source": source})


def finish_export(order: WorkOrder, spec: ExportSpec, objects: ObjectStore) -> Done:
    """Write the manifest: settings, provenance, and name, pairs, size and SHA-256 of every archive."""
    from cffa_core.recipes.export_pairs import export_manifest

    made = order.facts["export"]
    files = made["files"]
    if [file["name"] for file in files] != sorted(order.inputs["export"].files):
        raise CorruptArtifact("the export left other archives than it said")
    text = export_manifest(spec.settings(), made["header"], made["source"], files)
    key = result_key(order.job_id, order.kind, order.attempt, MANIFEST)
    written = objects.put_bytes(key, text.encode())
    return Done(
        stored=StoredFiles({MANIFEST: written}),
        info={"files": len(files)},
        job_result={
            "form": spec.form,
            "pairs": sum(file["pairs"] for file in files),
            "files": len(files),
            "bytes": sum(file["size"] for file in files),
            "manifest": {"sha256": written.sha256},
        },
    )


def _header(objects: ObjectStore, archive: ObjectInfo, folder: Path) -> dict[str, Any]:
    """What the first part says of all: spec, model digest, versions. Fetched whole, since its SHA-256 is the zip's."""
    from cffa_core.recipes.export_archive import read_header

    path = folder / "first.zip"
    objects.fetch(archive, path)
    header = read_header(path)
    path.unlink()
    return header
