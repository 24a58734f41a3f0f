"""Placeholder tokens through the service: a training job with masks, generation by subsets, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.data.phantom import write_phantoms
from cffa_core.errors import InvalidSpec
from cffa_core.jobs.records import Dataset, Job
from cffa_core.jobs.spec import SamplerSpec, Scheduler
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.recipes.archive import verify_archive
from tests.worker.world import SIDE, World

QUICK: dict[str, Any] = {"count": 2, "part_size": 2, "sampler": SamplerSpec(scheduler=Scheduler.DDIM, steps=2)}
TOKENS: dict[str, Any] = {
    "tokens": ["disc", "lesion"],
    "phase1_steps": 1,
    "phase1_learning_rate": 0.1,
    "text_learning_rate": 0.1,
    "prior_images": 1,
    "prior_steps": 1,
    "template": "a photo of {tokens}",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, models_dir: Path) -> Iterator[tuple[World, Dataset, list[Job]]]:
    """A training job and two generation jobs of one installation, done by one worker."""
    folder = tmp_path_factory.mktemp("tokens")
    write_phantoms(folder / "eyes", 4, seed=3, resolution=SIDE, processes=1)
    world = World(folder / "home", models_dir)
    try:
        dataset = world.add_dataset(source=folder / "eyes")
        posted = world.training(dataset, tokens=TOKENS, steps=2, checkpoint_every=2, preview_every=2)
        with world.worker_thread():
            trained = world.wait_terminal(posted.id, 300)
            assert trained.state is JobState.SUCCEEDED, trained.error
            model_id = trained.result["model_id"]
            jobs = [world.generation(model_id, tokens=tokens, **QUICK) for tokens in (("disc",), None)]
            yield world, dataset, [trained, *(world.wait_terminal(job.id, 300) for job in jobs)]
    finally:
        world.close()


def test_the_model_has_its_tokens_and_the_run_a_sheet(made: tuple[World, Dataset, list[Job]]) -> None:
    world, dataset, (trained, *_) = made
    assert {f"masks/disc/p{i:05d}.png" for i in range(4)} <= set(dataset.stored.files)
    model = world.store.get_model("local", trained.result["model_id"])
    assert {"tokens.safetensors", "text_encoder.safetensors"} <= set(model.stored.files)
    assert model.card["parameters"]["tokens"] == 2 * 32
    assert [token["name"] for token in model.card["settings"]["tokens"]["tokens"]] == ["disc", "lesion"]
    (unit,) = world.store.parts("local", trained.id, kind=UnitKind.TRAIN)
    assert any(name.endswith("_random_pairs/attention.png") for name in unit.stored.files)


def test_pairs_of_a_subset_differ_from_those_of_all(made: tuple[World, Dataset, list[Job]], tmp_path: Path) -> None:
    world, _, (_, subset, whole) = made
    found = {}
    for name, job in (("subset", subset), ("whole", whole)):
        assert job.state is JobState.SUCCEEDED, job.error
        (final,) = world.store.parts("local", job.id, kind=UnitKind.FINALIZE)
        world.objects.fetch(final.stored.files["archive.zip"], tmp_path / f"{name}.zip")
        found[name] = verify_archive(tmp_path / f"{name}.zip")
    assert (found["subset"]["spec"]["tokens"], found["whole"]["spec"]["tokens"]) == (["disc"], None)
    digests = [[pair["cf"]["sha256"] for pair in found[name]["pairs"]] for name in ("subset", "whole")]
    assert not set(digests[0]) & set(digests[1])


def test_what_cannot_be_is_refused_when_it_is_posted(made: tuple[World, Dataset, list[Job]]) -> None:
    world, dataset, (trained, *_) = made
    with pytest.raises(InvalidSpec) as caught:
        world.generation(trained.result["model_id"], tokens=("disc", "cup"), **QUICK)
    (problem,) = caught.value.problems
    assert (problem.pointer, problem.code) == ("/tokens", "unknown_token") and "it has disc, lesion" in problem.message
    with pytest.raises(InvalidSpec) as caught:
        world.training(dataset, tokens={"tokens": ["disc", "cup_rim"], "phase1_steps": 1})
    (problem,) = caught.value.problems
    assert (problem.pointer, problem.code) == ("/tokens/tokens/1", "missing_mask")
    bare = world.add_dataset()
    with pytest.raises(InvalidSpec, match="cannot use"):
        world.training(bare, tokens={"tokens": ["vessel"], "phase1_steps": 1})
    world.training(bare, tokens={"tokens": [{"name": "vessel", "source": "frangi"}], "phase1_steps": 1})
