"""Attention jobs end to end with the child that computes: inputs, report, manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.jobs.records import Job
from cffa_core.jobs.spec import AttentionSpec, SamplerSpec
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.storage.manifest import read_verified
from tests.worker.world import OWNER, SIDE, World

# One installation for the whole file, also where tests are spread over processes.
pytestmark = pytest.mark.xdist_group("attention jobs")


def post(world: World, model_id: str, **fields: Any) -> Job:
    """A small attention job."""
    values = {"model_id": model_id, "resolution": SIDE, "map_resolution": 8, "sampler": SamplerSpec(steps=2)}
    return world.post(AttentionSpec(**(values | fields)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[World]:
    """One installation for this module."""
    world = World(tmp_path_factory.mktemp("attention") / "home", models_dir)
    yield world
    world.close()


@pytest.fixture(scope="module")
def done(world: World) -> tuple[Job, Job]:
    """A training and a look into its model, both over."""
    dataset = world.add_dataset()
    with world.worker_thread():
        trained = world.wait_terminal(world.training(dataset, steps=2, preview_pairs=0).id)
        assert trained.result is not None, trained.error
        model_id = trained.result["model_id"]
        looked = post(world, model_id, kinds=("cross", "self"), index=2)
        return trained, world.wait_terminal(looked.id)


def test_the_report_and_its_files_are_stored(world: World, done: tuple[Job, Job]) -> None:
    _, looked = done
    assert looked.state is JobState.SUCCEEDED, looked.error
    (unit,) = world.store.parts(OWNER, looked.id, kind=UnitKind.COMPUTE)
    names = set(unit.stored.files)
    assert {"report.json", "report.md", "cf.png", "fa.png", "sheet.png", "maps.safetensors"} <= names
    report = json.loads(read_verified(world.objects, unit.stored.files["report.json"]))
    assert report["format"].startswith("cffa-attention")
    shown = read_verified(world.objects, unit.stored.files["report.md"]).decode()
    assert all(f"]({name})" in shown for name in names if name == "sheet.png")
    for name, info in unit.stored.files.items():
        data = read_verified(world.objects, info)
        assert not name.endswith(".png") or data.startswith(b"\x89PNG")
        assert str(world.settings.home).encode() not in data


def test_the_manifest_names_settings_model_and_files(world: World, done: tuple[Job, Job]) -> None:
    trained, looked = done
    (unit,) = world.store.parts(OWNER, looked.id, kind=UnitKind.COMPUTE)
    (final,) = world.store.parts(OWNER, looked.id, kind=UnitKind.FINALIZE)
    raw = read_verified(world.objects, final.stored.files["manifest.json"])
    manifest = json.loads(raw)
    assert manifest["format"] == "cffa-attention-job/1"
    assert (manifest["spec"]["index"], manifest["numerics_key"]) == (2, looked.numerics_key)
    assert trained.result is not None and looked.result is not None
    assert manifest["inputs"] == {"model_digest": trained.result["model_digest"]}
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == {
        name: info.sha256 for name, info in unit.stored.files.items()
    }
    assert looked.result["manifest"]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert looked.id not in raw.decode() and trained.id not in raw.decode()
