"""The ten lines of a notebook, and what the front of the library promises around them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cffa_core as cffa
from cffa_core.errors import Conflict, InvalidSpec, ModelUnavailable
from cffa_core.evaluation.pair_scores import TrainingPairs
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import NOVELTY_FILE
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec
from cffa_core.recipes.generate import generate_part, load_sampler
from tests.micro_base import write_micro_base
from tests.pair_folder import write_pair_folder

QUICK = {"preview_pairs": 0, "lora": {"rank": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a base, raw pairs and a trained run."""
    folder = tmp_path_factory.mktemp("library")
    write_micro_base(folder / "base")
    write_pair_folder(folder / "my_pairs", n=4)
    base = cffa.load_base(folder / "base", device="cpu")
    pairs = cffa.load_pairs(folder / "my_pairs", resolution=64)
    cffa.train(base, pairs, out=folder / "run", steps=2, seed=1, **QUICK)
    return folder


def test_the_ten_lines(folder: Path, tmp_path: Path) -> None:
    base = cffa.load_base(str(folder / "base"))
    pairs = cffa.load_pairs(str(folder / "my_pairs"), resolution=64)
    model = cffa.train(base, pairs, steps=2, seed=1, out=str(tmp_path / "runs/first"), **QUICK)
    for pair in model.sample(3, seed=1, steps=2):
        pair.save(str(tmp_path / "new_pairs"))
    names = sorted(path.relative_to(tmp_path / "new_pairs").as_posix() for path in tmp_path.rglob("new_pairs/*/*"))
    assert names == [f"{m}/{i:06d}.png" for m in ("cf", "fa") for i in range(3)]
    with Image.open(tmp_path / "new_pairs/fa/000002.png") as fa:
        assert (fa.size, fa.mode) == ((64, 64), "L")


@pytest.mark.parametrize(
    ("method", "own"),
    [("shared_attention", {"step_range": (0.0, 0.6)}), ("side_by_side", {"squeeze": False})],
)
def test_another_method_is_one_word_more(folder: Path, tmp_path: Path, method: str, own: dict[str, object]) -> None:
    base, pairs = cffa.load_base(folder / "base"), cffa.load_pairs(folder / "my_pairs", resolution=64)
    prompts = {"cf_prompt": "CF", "fa_prompt": "FA"}
    trained = cffa.train(base, pairs, method=method, **{method: own}, steps=2, out=tmp_path, **prompts, **QUICK)
    drawn = list(trained.sample(2, steps=2))
    assert trained.card["method"] == method and list(trained.card["parameters"]) == ["pair"]
    assert [(pair.cf.shape, pair.fa.shape) for pair in drawn] == [((64, 64, 3), (64, 64))] * 2
    again = list(cffa.load_model(tmp_path, base).sample(2, steps=2))
    assert all(np.array_equal(a.cf, b.cf) and np.array_equal(a.fa, b.fa) for a, b in zip(drawn, again, strict=True))


def test_a_conditional_model_draws_on_structures(folder: Path, tmp_path: Path) -> None:
    base, pairs = cffa.load_base(folder / "base"), cffa.load_pairs(folder / "my_pairs", resolution=64)
    model = cffa.train(base, pairs, method="controlnet", steps=1, out=tmp_path / "run", **QUICK)
    for structures in ("procedural", pairs):
        drawn = list(model.sample(2, steps=1, structures=structures))
        assert [pair.cf.shape for pair in drawn] == [(64, 64, 3)] * 2
    for structures in (None, "imagined", cffa.load_pairs(folder / "my_pairs", resolution=32)):
        with pytest.raises(InvalidSpec, match="structures"):
            list(model.sample(1, structures=structures))


def test_new_pairs_can_be_loaded_as_pairs(folder: Path, tmp_path: Path) -> None:
    model = cffa.load_model(folder / "run", cffa.load_base(folder / "base"))
    for pair in model.sample(2, steps=1):
        pair.save(tmp_path)
    assert [pair.name for pair in cffa.load_pairs(tmp_path, resolution=64)] == ["000000", "000001"]


def test_it_equals_the_service_s_recipe(folder: Path, tmp_path: Path) -> None:
    settings = GenerateSettings(count=3, resolution=64, seed=5, batch_size=2, sampler=SamplerSpec(steps=2))
    sampler = load_sampler(settings, folder / "run/best_checkpoint", folder / "base")
    known = TrainingPairs.read(folder / "run" / NOVELTY_FILE)
    expected = generate_part(sampler, settings, 0, tmp_path / "part", FolderContext(tmp_path), training=known)
    model = cffa.load_model(folder / "run", cffa.load_base(folder / "base"))
    found = [pair.save(tmp_path / "library") for pair in model.sample(3, seed=5, batch_size=2, steps=2)]
    assert found == expected["pairs"]


def test_fewer_pairs_are_the_first_of_more(folder: Path) -> None:
    model = cffa.load_model(folder / "run", cffa.load_base(folder / "base"))
    few, more = (list(model.sample(count, seed=1, steps=1, batch_size=2)) for count in (1, 3))
    assert np.array_equal(few[0].cf, more[0].cf)


def test_one_base_serves_several_models(folder: Path, tmp_path: Path) -> None:
    base = cffa.load_base(folder / "base")
    first = cffa.load_model(folder / "run", base)
    before = next(iter(first.sample(1, steps=1)))
    pairs = cffa.load_pairs(folder / "my_pairs", resolution=64)
    cffa.train(base, pairs, steps=2, seed=2, learning_rate=0.01, out=tmp_path / "second", **QUICK)
    assert np.array_equal(before.cf, next(iter(first.sample(1, steps=1))).cf)


def test_training_again_into_the_same_folder_returns_the_finished_model(folder: Path) -> None:
    base, pairs = cffa.load_base(folder / "base"), cffa.load_pairs(folder / "my_pairs", resolution=64)
    seen: list[str] = []
    options = {"out": folder / "run", "steps": 2, "on_progress": lambda stage, *_: seen.append(stage)}
    model = cffa.train(base, pairs, seed=1, **options, **QUICK)
    assert seen == [] and model.card["step"] == 2
    with pytest.raises(Conflict, match="another folder"):
        cffa.train(base, pairs, seed=2, **options, **QUICK)


def test_progress_is_told(folder: Path, tmp_path: Path) -> None:
    base, pairs = cffa.load_base(folder / "base"), cffa.load_pairs(folder / "my_pairs", resolution=64)
    seen: list[tuple[str, int, int]] = []
    cffa.train(base, pairs, steps=1, out=tmp_path, on_progress=lambda *values: seen.append(values), **QUICK)
    assert ("training", 1, 1) in seen


def test_wrong_settings_are_named(folder: Path, tmp_path: Path) -> None:
    base, pairs = cffa.load_base(folder / "base"), cffa.load_pairs(folder / "my_pairs", resolution=64)
    with pytest.raises(InvalidSpec, match="steps: ") as caught:
        cffa.train(base, pairs, steps=0, out=tmp_path)
    assert caught.value.problems[0].pointer == "/steps"
    with pytest.raises(InvalidSpec, match="sampler/scheduler"):
        cffa.load_model(folder / "run", base).sample(1, scheduler="magic")
    with pytest.raises(InvalidSpec, match="step_count"):
        cffa.train(base, pairs, step_count=3, out=tmp_path)


def test_a_model_finds_its_base_by_name_or_says_so(folder: Path) -> None:
    with pytest.raises(ModelUnavailable, match="'base'"):
        cffa.load_model(folder / "run")


def test_importing_the_package_brings_no_torch() -> None:
    code = "import sys, cffa_core; dir(cffa_core); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'sample'"):
        _ = cffa.sample
