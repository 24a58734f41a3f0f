"""The parts of an edit job: fetch the pairs that a part changes, edit them, say of each where it comes from.

This runs in the child, called by ``execute``; what an edit does to a pair is the matter of the recipe. A data set is
fetched once and kept, as by other jobs; of an earlier job only the bytes of the pairs that the part needs are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.records import StoredFiles
from cffa_core.jobs.spec import EditSpec
from cffa_core.storage.base import ObjectStore
from services.worker.generated_pairs import MODALITIES, listed, part_objects, read_images
from services.worker.pair_parts import store_pairs
from services.worker.protocol import Done, WorkOrder
from services.worker.scratch import cached

if TYPE_CHECKING:
    from cffa_core.data.contracts import PairImages
    from cffa_core.editing.editor import PairEditor

FETCHING = "fetching pairs"
# Name and pixels of a pair, and what its manifest says of it: the digest of its set, its place in it, its files.
Found = tuple[str, "PairImages", dict[str, Any]]


def edit(
    order: WorkOrder,
    spec: EditSpec,
    context: JobContext,
    objects: ObjectStore,
    editor: PairEditor,
    header: dict[str, Any],
) -> Done:
    """Edit the pairs of one part and store them with their masks and sheets."""
    from cffa_core.data.pairs import square
    from cffa_core.editing.editor import SourcePair
    from cffa_core.recipes.edit import edit_part

    # Index of the edit and, of its source, name or index.
    wanted: list[tuple[int, Any]] = [(int(index), which) for index, which in order.facts["sources"]]
    read = _of_dataset if spec.dataset_id is not None else _of_job
    found = dict(read(order, spec, context, objects, [which for _, which in wanted]))
    sources, origins = [], {}
    for index, which in wanted:
        name, images, origins[index] = found.pop(which)
        sized = square(images, spec.resolution)
        where = None if spec.area is None else sized.masks[spec.area]
        sources.append(SourcePair(index=index, name=name, cf=sized.cf, fa=sized.fa, where=where))
    folder = Path(order.folder) / "part"
    folder.mkdir()
    edit_part(editor, spec.settings(), sources, folder, context)
    _tell_origins(folder / "part.json", origins)
    files, index_of_part = store_pairs(order, objects, header, folder)
    return Done(stored=StoredFiles(files), info={"pairs": [pair["index"] for pair in index_of_part["pairs"]]})


def _of_dataset(
    order: WorkOrder, spec: EditSpec, context: JobContext, objects: ObjectStore, names: list[str]
) -> Iterator[tuple[str, Found]]:
    from cffa_core.data.dataset_folder import read_index, read_pairs

    def on_file(done: int, total: int) -> None:
        context.progress("fetching dataset", done, total)

    stored = order.inputs["dataset"]
    folder = cached(objects, stored, Path(order.cache), "dataset", on_file)
    known = {pair.name: pair for pair in read_index(folder)[1]}
    if missing := [name for name in names if name not in known]:
        raise CorruptArtifact(f"the index of the data set does not name {missing[0]}, whose files it has")
    for pair, images in read_pairs(folder, [known[name] for name in names]):
        files = {modality: stored.files[f"{modality}/{pair.name}.png"].sha256 for modality in MODALITIES}
        if spec.area is not None:
            if spec.area not in images.masks:
                raise CorruptArtifact(f"the index of the data set does not name the mask {spec.area} of {pair.name}")
            files["area"] = stored.files[f"masks/{spec.area}/{pair.name}.png"].sha256
        yield pair.name, (pair.name, images, order.facts["source"] | {"name": pair.name, **files})


def _of_job(
    order: WorkOrder, spec: EditSpec, context: JobContext, objects: ObjectStore, indices: list[int]
) -> Iterator[tuple[int, Found]]:
    wanted, done = set(indices), 0
    for archive, listing in part_objects(order.inputs["pairs"]):
        for entry in listed(objects, listing):
            index = int(entry["index"])
            if index in wanted:
                both = {modality: entry[modality] for modality in MODALITIES}
                images = read_images(objects, archive, both)
                files = {modality: entry[modality]["sha256"] for modality in MODALITIES}
                origin = order.facts["source"] | {"index": index, **files}
                yield index, (f"{index:06d}", _decoded(images, index), origin)
                done += 1
                context.progress(FETCHING, done, len(wanted))
    if done != len(wanted):
        raise CorruptArtifact(f"the parts hold {done} of the {len(wanted)} pairs that are to be edited")


def _decoded(images: dict[str, bytes], index: int) -> PairImages:
    """The pixels of a made pair, all of them seen by both cameras."""
    import cv2
    import numpy as np

    from cffa_core.data.contracts import PairImages

    cf = cv2.imdecode(np.frombuffer(images["cf"], np.uint8), cv2.IMREAD_COLOR_RGB)
    fa = cv2.imdecode(np.frombuffer(images["fa"], np.uint8), cv2.IMREAD_GRAYSCALE)
    if cf is None or fa is None or cf.shape[:2] != fa.shape:
        raise CorruptArtifact(f"the images of pair {index} are not two PNG files of one size")
    seen = np.ones(fa.shape, bool)
    return PairImages(np.asarray(cf, np.uint8), np.asarray(fa, np.uint8), seen, seen)


def _tell_origins(path: Path, origins: dict[int, dict[str, Any]]) -> None:
    """Add to each pair of a part what it was made from."""
    part = json.loads(path.read_bytes())
    if [pair["index"] for pair in part["pairs"]] != sorted(origins):
        raise CorruptArtifact("the edit left other pairs than it was given")
    for pair in part["pairs"]:
        pair["source"] = origins[pair["index"]]
    path.write_text(json.dumps(part, indent=1, sort_keys=True) + "\n", encoding="utf-8")
