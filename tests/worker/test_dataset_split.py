"""Jobs on a version with a split: a training takes its train part, an evaluation the part it names; end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cffa_core.data.dataset_folder import pairs_of
from cffa_core.data.versions import split_by_fraction, version_index
from cffa_core.jobs.records import Dataset, StoredFiles
from cffa_core.jobs.spec import EvaluationSpec
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.storage.base import dataset_key
from cffa_core.storage.manifest import read_verified
from tests.worker.world import OWNER, World

pytestmark = pytest.mark.xdist_group("evaluation jobs")


def version_of(world: World, parent: Dataset) -> Dataset:
    """A version of all pairs, half of the eyes for training, the rest shared by validation and test."""
    index = json.loads(read_verified(world.objects, parent.stored.files["dataset.json"]))
    pairs = pairs_of(index)
    split = split_by_fraction(pairs, {"train": 0.5, "validation": 0.25, "test": 0.25}, seed=1)
    made = version_index(index, pairs, split, {name: info.sha256 for name, info in parent.stored.files.items()})
    new = world.store.new_id("ds")
    listing = world.objects.put_bytes(dataset_key(new, "dataset.json"), json.dumps(made).encode())
    return world.store.add_dataset(
        OWNER,
        dataset_id=new,
        name="split",
        digest=made["digest"],
        pairs=len(pairs),
        report={},
        stored=StoredFiles({**parent.stored.files, "dataset.json": listing}),
        parent_id=parent.id,
        split=split,
    )


def test_jobs_keep_to_the_parts_of_a_split(tmp_path: Path, models_dir: Path) -> None:
    world = World(tmp_path / "home", models_dir)
    try:
        version = version_of(world, world.add_dataset(count=8))
        spec = EvaluationSpec(
            base="micro",
            pairs_dataset_id=world.add_dataset(count=4).id,
            reference_dataset_id=version.id,
            reference_split="test",
            train_dataset_id=version.id,
        )
        evaluation, training = world.post(spec), world.training(version, steps=2, preview_pairs=0)
        with world.worker_thread():
            for job in (evaluation, training):
                done = world.wait_terminal(job.id)
                assert done.state is JobState.SUCCEEDED, done.error
        (unit,) = world.store.parts(OWNER, evaluation.id, kind=UnitKind.EVALUATE)
        report = json.loads(read_verified(world.objects, unit.stored.files["report.json"]))
        assert (report["reference"]["pairs"], report["train"]["pairs"]) == (2, 4)
        (unit,) = world.store.parts(OWNER, training.id, kind=UnitKind.TRAIN)
        log = read_verified(world.objects, unit.stored.files["validation_log.txt"]).decode()
        assert "the data set's own split counts" in log
    finally:
        world.close()
