"""Models and data sets passed on by the command line: what is written, what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from cffa_core.jobs.spec import LoraSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.models.base import load_base
from services.client.cli import app


def run(models_dir: Path, *arguments: str | Path) -> Result:
    environment = {"CFFA_MODELS_DIR": str(models_dir)}
    return CliRunner(env=environment).invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def printed(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def model(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder on `micro` whose LoRAs are not zero."""
    settings = TrainSettings(base="micro", resolution=64, lora=LoraSpec(rank=2, alpha=3.0))
    found = DualUnet(load_base("micro", models_dir=models_dir), settings)
    with torch.no_grad():
        for parameter in found.lora.parameters():
            parameter.add_(0.05)
    folder = tmp_path_factory.mktemp("model") / "best_checkpoint"
    found.save(folder, dataset_digest="d", validation=None)
    return folder


def test_a_model_goes_out_and_comes_back(models_dir: Path, model: Path, tmp_path: Path) -> None:
    report = printed(run(models_dir, "model", "export", model.parent, "--lora", tmp_path / "lora", "--json"))
    assert report["lora"]["alpha"] == 3.0
    for entry in report["files"].values():
        assert (tmp_path / "lora" / entry["file"]).is_file()
    files = ("--cf", tmp_path / "lora" / "cf", "--fa", tmp_path / "lora" / report["files"]["fa"]["file"])
    more = ("--card", tmp_path / "lora" / "card.json", "--base", "micro", "--out", tmp_path / "back", "--json")
    card = printed(run(models_dir, "model", "import", *files, *more))
    assert card["base"]["name"] == "micro" and card["settings"]["lora"]["rank"] == 2
    options = ("--count", "1", "--steps", "1", "--resolution", "64", "--device", "cpu", "--json")
    ours = printed(run(models_dir, "generate", model, "--out", tmp_path / "a", *options))
    theirs = printed(run(models_dir, "generate", tmp_path / "back", "--out", tmp_path / "b", *options))
    assert [pair["alignment"] for pair in ours["pairs"]] == [pair["alignment"] for pair in theirs["pairs"]]
    for name in ("cf/000000.png", "fa/000000.png"):  # the marks say which model drew them, the pixels are the same
        with Image.open(tmp_path / "a" / name) as one, Image.open(tmp_path / "b" / name) as other:
            assert one.tobytes() == other.tobytes()
            assert one.info["Model digest"] != other.info["Model digest"]


def test_one_modality_merged_is_a_base(models_dir: Path, model: Path, tmp_path: Path) -> None:
    result = run(models_dir, "model", "export", model, "--merged", tmp_path / "merged", "--modality", "fa")
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == ["card.json", "fa"]
    assert "Writing" not in result.stderr
    info = printed(run(models_dir, "base", "info", tmp_path / "merged" / "fa", "--json"))
    assert "`fa`" in info["card"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model", "export", "MODEL"), "--merged"),
        (("model", "export", "MODEL", "--lora", "OUT", "--merged", "OUT"), "one of the two"),
        (("model", "export", "MODEL", "--lora", "OUT", "--modality", "oct"), "it has cf, fa"),
        (("model", "export", "MODEL", "--lora", "MODEL"), "nothing is written over"),
        (("model", "import", "--cf", "MODEL/lora_cf.safetensors", "--base", "micro", "--out", "OUT"), "LoRA of FA"),
        (("dataset", "export", "MODEL", "--format", "zip", "--out", "OUT"), "no pairs found"),
    ],
)
def test_failures_are_one_plain_line(
    models_dir: Path, model: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    given = [a.replace("MODEL", str(model)).replace("OUT", str(tmp_path / "out")) for a in arguments]
    result = run(models_dir, *given)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ") or "\nerror: " in result.stderr
    assert words in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_data_set_goes_out(models_dir: Path, pairs_folder: Path, tmp_path: Path) -> None:
    options = ("--format", "webdataset", "--shard-pairs", "4", "--origin", "procedural", "--licence", "CC0-1.0")
    report = printed(run(models_dir, "dataset", "export", pairs_folder, "--out", tmp_path / "out", *options, "--json"))
    assert (report["pairs"], report["origin"], report["licence"]) == (6, {"kind": "procedural"}, "CC0-1.0")
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    result = run(models_dir, "dataset", "export", pairs_folder, "--format", "zip", "--out", tmp_path / "pairs.zip")
    assert result.exit_code == 0, result.stderr
    assert "not stated" in result.stdout
    refused = run(models_dir, "dataset", "export", pairs_folder, "--format", "dicom", "--out", tmp_path / "dicom")
    assert refused.exit_code == 1 and "may show a patient" in " ".join(refused.stderr.split())
    assert not (tmp_path / "dicom").exists()
    checked = printed(run(models_dir, "dataset", "check", tmp_path / "pairs.zip", "--json"))
    assert checked["digest"] == report["digest"]


@pytest.mark.parametrize("command", ["model export", "model import", "dataset export"])
def test_every_command_explains_itself(models_dir: Path, command: str) -> None:
    result = run(models_dir, *command.split(), "--help")
    assert result.exit_code == 0 and "Usage" in result.stdout
