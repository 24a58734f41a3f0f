"""The direct commands ``cffa captioned train | draw | describe``: what they write and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cffa_core.data.captions import read_captions
from cffa_core.jobs.captioned_spec import CaptionedSizes
from services.client.cli import app

TEXT = "A high quality color fundus photograph, retinal structure"


def cffa(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def run(sizes: CaptionedSizes, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("commands") / "run"
    spec = out.parent / "spec.json"
    spec.write_text(json.dumps({"sizes": sizes.model_dump()}))
    words = ("--spec", spec, "--steps", "1", "--batch-size", "2", "--every", "1", "--device", "cpu", "--json")
    made = cffa("captioned", "train", dataset, "--out", out, *words)
    assert made.exit_code == 0, made.output
    card = json.loads(made.stdout)
    assert (card["step"], card["settings"]["batch_size"], card["family"]) == (1, 2, "captioned")
    return out


def test_draw(run: Path, tmp_path: Path) -> None:
    words = ("-n", "2", "--steps", "10", "--guidance", "1.5", "--device", "cpu", "--json")
    made = cffa("captioned", "draw", run, TEXT, TEXT, "--out", tmp_path, *words)
    assert made.exit_code == 0, made.output
    assert len(list((tmp_path / "images").glob("*.png"))) == 4
    assert json.loads(made.stdout)["settings"]["guidance_scale"] == 1.5


def test_describe(run: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("-n", "2", "--top-k", "5", "--max-images", "2", "--device", "cpu")
    made = cffa("captioned", "describe", run / "best_checkpoint", dataset, "--out", tmp_path, *words)
    assert made.exit_code == 0, made.output
    assert list(read_captions(tmp_path)) == ["p00000", "p00001"] and "token_f1" in made.stdout


def test_bad_input_is_one_line(run: Path, tmp_path: Path) -> None:
    unknown = cffa("captioned", "draw", run, "a cataract", "--out", tmp_path, "--device", "cpu")
    assert unknown.exit_code == 1 and "never read 'cataract'" in " ".join(unknown.stderr.split())
    steps = cffa("captioned", "draw", run, TEXT, "--out", tmp_path, "--steps", "5", "--device", "cpu")
    assert steps.exit_code == 1 and "/ddim_steps" in steps.stderr
