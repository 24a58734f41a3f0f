"""Storing pairs: the archive of one part, and at the end the one of the whole job with its manifest.

Generated and edited pairs alike; what is in the header, and which pairs, is the matter of the callers. This runs in the
child and reads and writes object storage and scratch folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import PairGrid
from cffa_core.recipes.archive import REJECTS, merge_archives, write_part_archive
from cffa_core.storage.base import ObjectInfo, ObjectStore, part_key, result_key
from services.worker.protocol import Done, WorkOrder
from services.worker.tracked import Tracked

ARCHIVE = "archive.zip"


def store_pairs(
    order: WorkOrder,
    objects: ObjectStore,
    header: Mapping[str, Any],
    folder: Path,
    zip_name: str = "pairs.zip",
    index_name: str = "part.json",
) -> tuple[dict[str, ObjectInfo], dict[str, Any]]:
    """Archive and store a folder of pairs with its index; returns the stored files and the index."""
    archive = Path(order.folder) / zip_name
    index = write_part_archive(folder, archive, header, rejects=folder.name == REJECTS)

    def key(name: str) -> str:
        return part_key(order.job_id, order.index, order.attempt, name)

    stored = objects.put_file(key(zip_name), archive)
    if stored.sha256 != index["sha256"]:
        raise CorruptArtifact(f"part {order.index} was stored with other bytes than were written")
    listing = objects.put_bytes(key(index_name), json.dumps(index, sort_keys=True).encode())
    return {zip_name: stored, index_name: listing}, index


def finish_pairs(
    order: WorkOrder, spec: PairGrid, context: JobContext, objects: ObjectStore, header: Mapping[str, Any], form: str
) -> tuple[Done, Path, int]:
    """Join the archives of all parts into one and store it with the job's manifest, of the format ``form``.

    Returns what was stored, the archive's path in the unit's folder, and the number of slots that stayed empty. Raises
    ``CorruptArtifact`` if the parts do not hold what the job asked for.
    """
    parts = sorted(order.inputs["parts"].files.items())
    folder = Path(order.folder)

    def fetched() -> Iterator[Path]:
        for done, (name, info) in enumerate(parts, start=1):
            path = folder / f"{name}.zip"
            objects.fetch(info, path)
            yield path
            path.unlink()
            context.progress("archive", done, len(parts))

    def key(name: str) -> str:
        return result_key(order.job_id, order.kind, order.attempt, name)

    archive = folder / ARCHIVE
    merged = merge_archives(fetched(), archive, header)
    empty = merged["exhausted"]
    if merged["pairs"] + len(empty) != len(spec.indices):
        raise CorruptArtifact(
            f"the parts hold {merged['pairs']} pairs and {len(empty)} empty slots, the job asked for "
            f"{len(spec.indices)} pairs"
        )
    with Tracked(archive, lambda done, total: context.progress("storing", done, total)) as stream:
        stored = objects.put_stream(key(ARCHIVE), stream)
    entry = {"size": stored.size, "sha256": stored.sha256}
    manifest = {
        "format": form,
        **header,
        "archive": {"name": ARCHIVE, "pairs": merged["pairs"], **entry},
        "exhausted": empty,
        "parts": [{"name": name, "size": info.size, "sha256": info.sha256} for name, info in parts],
    }
    text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
    listing = objects.put_bytes(key("manifest.json"), text.encode())
    done = Done(
        stored=StoredFiles({ARCHIVE: stored, "manifest.json": listing}),
        info={"pairs": merged["pairs"]},
        job_result={"pairs": merged["pairs"], "archive": entry, "manifest": {"sha256": listing.sha256}},
    )
    return done, archive, len(empty)
