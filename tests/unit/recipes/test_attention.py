"""An attention job's pair is the generation's pair to the last bit; its maps are those of that pair's sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from typer.testing import CliRunner

import cffa_core
from cffa_core.errors import Cancelled, InvalidSpec
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import AttentionSettings, LoraSpec, Method, TrainSettings
from cffa_core.methods.registry import METHODS
from cffa_core.models.base import load_base
from cffa_core.recipes.attention import as_generation, capture_attention
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.structures import structures_for
from services.client.cli import app
from tests.micro_base import write_micro_base

SAMPLER = {"steps": 4, "cf_prompt": "red disc", "fa_prompt": "bright vessels"}


def nothing(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_base(tmp_path_factory.mktemp("base") / "micro")


@pytest.fixture(scope="module")
def models(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model folder of every method."""
    base, folder = load_base(base_folder), tmp_path_factory.mktemp("models")
    for method in Method:
        spec = TrainSettings(method=method, resolution=64, lora=LoraSpec(rank=4), cf_prompt="red", fa_prompt="bright")
        METHODS[method](base, spec).save(folder / method.value, dataset_digest="0" * 64, validation=None)
    return {method.value: folder / method.value for method in Method}


def settings(**fields: Any) -> AttentionSettings:
    return AttentionSettings.model_validate({"resolution": 64, "map_resolution": 8, "sampler": SAMPLER} | fields)


@pytest.mark.parametrize("method", [method.value for method in Method])
def test_the_pair_is_that_of_a_generation(
    base_folder: Path, models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    asked = settings(
        index=2,
        kinds=("cross", "self"),
        structures="procedural" if method == "controlnet" else None,
        sampler=SAMPLER | {"guidance_scale": 2.0},
    )
    report = capture_attention(asked, models[method], base_folder, tmp_path / "seen", nothing)
    generation = as_generation(asked)
    sampler = load_sampler(generation, models[method], base_folder)
    made = tmp_path / "made"
    if method == "controlnet":
        part = generate_part(
            sampler, generation, 0, made, FolderContext(made), structures_for(generation, sampler.model)
        )
    else:
        part = generate_part(sampler, generation, 0, made, FolderContext(made))
    pair = part["pairs"][2]
    for m in ("cf", "fa"):
        assert (tmp_path / "seen" / f"{m}.png").read_bytes() == (made / pair[m]["name"]).read_bytes()
    assert report["pair"]["seed"] == pair["seed"]
    maps = load_file(tmp_path / "seen" / "maps.safetensors")
    wide = 4 if method == "side_by_side" else 8
    for m in ("cf", "fa"):
        words = [word for word in report["words"] if word["modality"] == m]
        assert maps[f"cross/{m}"].shape == (len(words), 8, wide)
    # A look is spread over all that there is to look at.
    looks = [look for look in report["looks"] if look["from"] == "cf"]
    assert sum(look["share"] for look in looks) == pytest.approx(1, abs=1e-4)
    assert len(looks) == (2 if method == "side_by_side" else 1)
    assert json.loads((tmp_path / "seen" / "report.json").read_text()) == report
    for name in ["sheet.png", *(entry["overlay"] for entry in (*report["words"], *report["looks"]))]:
        with Image.open(tmp_path / "seen" / name) as picture:
            assert picture.size == (64, 64) or name == "sheet.png"


def test_steps_and_layers_by_themselves_average_to_the_whole(
    base_folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    asked = settings(
        kinds=("cross", "self"), steps=(0, 3), each_step=True, each_layer=True, places=("down", "mid", "up")
    )
    report = capture_attention(asked, models["dual_unet"], base_folder, tmp_path / "both", nothing)
    plain = capture_attention(
        asked.model_copy(update={"each_step": False, "each_layer": False}),
        models["dual_unet"],
        base_folder,
        tmp_path / "plain",
        nothing,
    )
    assert report["kept_steps"] == plain["kept_steps"] == [0, 3]
    assert {layer["place"] for layer in report["layers"]} == {"down", "mid", "up"}
    maps, whole = load_file(tmp_path / "both" / "maps.safetensors"), load_file(tmp_path / "plain" / "maps.safetensors")
    for name in ("cross/fa", "self/cf"):
        by_step = np.mean([maps[f"steps/{step:06d}/{name}"] for step in (0, 3)], axis=0)
        kind = name.partition("/")[0]
        layers = [layer["name"] for layer in report["layers"] if layer["kind"] == kind]
        by_layer = np.mean([maps[f"layers/{layer}/{name}"] for layer in layers], axis=0)
        for found in (by_step, by_layer, maps[name]):
            np.testing.assert_allclose(found, whole[name], rtol=1e-4, atol=1e-7)
    assert (tmp_path / "both" / "steps.png").is_file() and (tmp_path / "both" / "layers.png").is_file()
    assert not (tmp_path / "plain" / "steps.png").exists()


def test_only_words_that_were_asked_for_are_kept(base_folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    report = capture_attention(settings(tokens=("Vessels",)), models["dual_unet"], base_folder, tmp_path, nothing)
    assert [(word["modality"], word["word"]) for word in report["words"]] == [("fa", "Vessels")]
    assert set(load_file(tmp_path / "maps.safetensors")) == {"cross/fa"}


def test_a_word_in_neither_prompt_is_refused_with_the_words_there_are(
    base_folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    asked = settings(tokens=("disc", "macula"))
    with pytest.raises(InvalidSpec, match="'macula'; the words are cf: red, disc; fa: bright, vessels") as caught:
        capture_attention(asked, models["dual_unet"], base_folder, tmp_path / "out", nothing)
    assert caught.value.problems[0].pointer == "/tokens/1"
    assert not (tmp_path / "out").exists()


def test_what_progress_raises_is_let_through(base_folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    def cancel(stage: str, done: int, total: int) -> None:
        if stage == "sampling" and done == 2:
            raise Cancelled("enough")

    with pytest.raises(Cancelled):
        capture_attention(settings(), models["dual_unet"], base_folder, tmp_path / "out", cancel)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"each_step": True, "map_resolution": 128}, "at most 6 steps"),
        ({"steps": (50,)}, "counted from 0"),
        ({"kinds": ("cross", "cross")}, "each once"),
    ],
)
def test_settings_that_cannot_be_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AttentionSettings.model_validate(fields)


def test_the_command_and_the_library_write_what_the_recipe_writes(
    base_folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    model = models["dual_unet"]
    asked = {"seed": 5, "kinds": ("cross", "self"), "points": ((0.2, 0.6),), "places": ("down", "up")}
    capture_attention(settings(**asked, sampler={"steps": 2}), model, base_folder, tmp_path / "recipe", nothing)
    loaded = cffa_core.load_model(model, cffa_core.load_base(base_folder, device="cpu"))
    loaded.attention(tmp_path / "library", map_resolution=8, sampler={"steps": 2}, **asked)
    options = (
        "--seed 5 --kind cross --kind self --point 0.2,0.6 --resolution 64 --map-resolution 8 --steps 2 --device cpu"
    )
    arguments = ["attention", str(model), "--out", str(tmp_path / "command"), "--base", str(base_folder)]
    shown = CliRunner().invoke(app, [*arguments, *options.split()])
    assert shown.exit_code == 0, shown.output
    assert "bright" in shown.output
    for name in ("report.json", "report.md", "cf.png", "fa.png", "sheet.png", "maps.safetensors"):
        wanted = (tmp_path / "recipe" / name).read_bytes()
        assert (tmp_path / "library" / name).read_bytes() == wanted, name
        assert (tmp_path / "command" / name).read_bytes() == wanted, name


def test_structures_belong_to_controlnet(base_folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    for method, structures in (("controlnet", None), ("dual_unet", "procedural")):
        with pytest.raises(InvalidSpec) as caught:
            capture_attention(settings(structures=structures), models[method], base_folder, tmp_path, nothing)
        assert caught.value.problems[0].pointer == "/structures"
