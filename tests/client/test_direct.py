"""Training, generation and evaluation by the command line, without a service, on the micro base at 64 px."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from services.client.cli import app

SMALL = ("--resolution", "64", "--steps", "2", "--device", "cpu")


def run(models_dir: Path, *arguments: str | Path) -> Result:
    environment = {"CFFA_MODELS_DIR": str(models_dir)}
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def printed(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def model(models_dir: Path, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model folder."""
    out = tmp_path_factory.mktemp("run")
    options = ("--base", "micro", "--preview-pairs", "0", "--rank", "2", "--out", out, "--json")
    card = printed(run(models_dir, "train", pairs_folder, *SMALL, *options))
    assert (card["step"], card["base"]["name"], card["settings"]["lora"]["rank"]) == (2, "micro", 2)
    return out / "best_checkpoint"


def test_pairs_and_their_sheet(models_dir: Path, model: Path, tmp_path: Path) -> None:
    options = ("--count", "3", "--batch-size", "2", "--set", "part_size=2", "--out", tmp_path, "--json")
    report = printed(run(models_dir, "generate", model, *SMALL, *options, "--sheet", tmp_path / "sheet.png"))
    assert [pair["index"] for pair in report["pairs"]] == [0, 1, 2]
    for pair in report["pairs"]:
        with Image.open(tmp_path / pair["cf"]["name"]) as cf, Image.open(tmp_path / pair["fa"]["name"]) as fa:
            assert (cf.size, cf.mode, fa.size, fa.mode) == ((64, 64), "RGB", (64, 64), "L")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cf", "fa", "manifest.json", "sheet.png"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["pairs"] == report["pairs"] and manifest["synthetic"] is True
    assert manifest["dataset_digest"] == json.loads((model / "model.json").read_text())["dataset_digest"]
    # The thumbnails of the training pairs lie beside the model.
    assert {pair["novelty"]["nearest"][0] for pair in report["pairs"]} == {"p"}


def test_a_gate_that_nothing_passes_leaves_the_slots_empty(models_dir: Path, model: Path, tmp_path: Path) -> None:
    gate = ("--max-similarity", "0", "--max-tries", "2")
    shown = run(models_dir, "generate", model, *SMALL, "--count", "2", *gate, "--out", tmp_path)
    assert shown.exit_code == 0 and "2 of 2 slots stayed empty" in " ".join((shown.stdout + shown.stderr).split())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["pairs"] == [] and [slot["tries"] for slot in manifest["exhausted"]] == [2, 2]
    refused = sorted(path.name for path in (tmp_path / "rejects" / "cf").iterdir())
    assert refused == ["000000.try00.png", "000000.try01.png", "000001.try00.png", "000001.try01.png"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere)
    refusal = run(models_dir, "generate", elsewhere, *SMALL, "--count", "2", *gate, "--out", tmp_path / "out")
    assert refusal.exit_code == 1 and "trained on are not known" in " ".join(refusal.stderr.split())


def test_alignment_of_pairs_against_a_reference(models_dir: Path, pairs_folder: Path, tmp_path: Path) -> None:
    options = ("--reference", pairs_folder, "--out", tmp_path, "--json")
    report = printed(run(models_dir, "evaluate", "alignment", pairs_folder, *options))
    assert report["scores"]["ngf"]["true"]["value"] > report["scores"]["ngf"]["shuffled"]["value"]
    assert json.loads((tmp_path / "alignment.json").read_text()) == report
    table = run(models_dir, "evaluate", "alignment", pairs_folder).stdout
    assert "ridge correlation" in table


def test_alignment_of_a_model_draws_pairs_first(models_dir: Path, model: Path, tmp_path: Path) -> None:
    options = ("--count", "2", "--steps", "1", "--device", "cpu", "--out", tmp_path, "--json")
    report = printed(run(models_dir, "evaluate", "alignment", model, *options))
    assert report["pairs"]["available"] == 2
    assert len(list((tmp_path / "pairs" / "cf").iterdir())) == 2


@pytest.mark.parametrize("given", ["option", "environment"])
def test_train_looks_for_lpips_weights_where_it_was_told(
    models_dir: Path, pairs_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    absent = tmp_path / "absent.safetensors"
    options = ["--base", "micro", "--out", tmp_path / "out", "--set", "loss.lpips_lambda=0.1"]
    if given == "option":
        options += ["--lpips-weights", absent]
    else:
        monkeypatch.setenv("CFFA_LPIPS_WEIGHTS", str(absent))
    result = run(models_dir, "train", pairs_folder, *SMALL, *options)
    assert result.exit_code == 1
    assert "no LPIPS weights at" in result.stderr and "absent.safetensors" in "".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_model_is_refused(models_dir: Path, tmp_path: Path) -> None:
    result = run(models_dir, "generate", tmp_path, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 1
    assert "model.json" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_conditional_model_draws_on_structures(models_dir: Path, pairs_folder: Path, tmp_path: Path) -> None:
    options = ("--base", "micro", "--method", "controlnet", "--vessels", "masks", "--no-tile", "--preview-pairs", "1")
    quick = ("--rank", "2", "--set", "preview.steps=1", "--out", tmp_path / "run", "--json")
    card = printed(run(models_dir, "train", pairs_folder, *SMALL, *options, *quick))
    assert card["settings"]["controlnet"]["vessels"] == "masks"
    assert set(card["parameters"]) == {"cf", "fa", "controlnet_vessels"}
    model = tmp_path / "run" / "best_checkpoint"
    sources = []
    for structures in ("procedural", pairs_folder):
        out = tmp_path / f"{structures}".rpartition("/")[2]
        drawn = ("--count", "2", "--out", out, "--json", "--structures", structures)
        sources += [pair["structure"] for pair in printed(run(models_dir, "generate", model, *SMALL, *drawn))["pairs"]]
    assert [list(source) for source in sources] == [["procedural_seed"]] * 2 + [["pair"]] * 2
    assert [source["pair"] for source in sources[2:]] == ["p00000", "p00001"]
    refused = run(models_dir, "generate", model, *SMALL, "--out", tmp_path / "none")
    assert refused.exit_code == 1 and "draws on structures" in " ".join(refused.stderr.split())
