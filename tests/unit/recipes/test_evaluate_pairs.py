"""The whole evaluation: folders in, one report with its pictures out, and the command that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
from PIL import Image
from typer.testing import CliRunner

from cffa_core.data.phantom import write_phantoms
from cffa_core.errors import InvalidDataset, InvalidSpec, ModelUnavailable
from cffa_core.recipes.evaluate_pairs import evaluate_pairs
from services.client.cli import app

COPIED = ("p00003", "p00007")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """12 pairs, the first two of which are training pairs (one mirrored); 22 held-out pairs; 24 training pairs."""
    root = tmp_path_factory.mktemp("sets")
    for name, count, seed in (("made", 12, 1), ("real", 22, 2), ("learnt", 24, 3)):
        write_phantoms(root / name, count, seed=seed, resolution=64, processes=1)
    for number, name in enumerate(COPIED):
        for kind in ("cf", "fa"):
            image = cv2.imread(str(root / "learnt" / kind / f"{name}.png"), cv2.IMREAD_UNCHANGED)
            cv2.imwrite(str(root / "made" / kind / f"p{number:05d}.png"), image[:, ::-1] if number else image)
    return {name: root / name for name in ("made", "real", "learnt")}


@pytest.fixture(scope="module")
def whole(sets: dict[str, Path], base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of everything, its folder, and what was told on the way."""
    out = tmp_path_factory.mktemp("report")
    told: list[tuple[str, int, int]] = []
    report = evaluate_pairs(
        sets["made"],
        reference=sets["real"],
        train=sets["learnt"],
        base=str(base_folder),
        out=out,
        on_progress=lambda *news: told.append(news),
    )
    return {"report": report, "out": out, "told": told, "json": json.loads((out / "report.json").read_text())}


def test_the_report_is_written_whole(whole: dict[str, Any]) -> None:
    out: Path = whole["out"]
    assert sorted(path.name for path in out.iterdir()) == [
        "alignment.png", "memorisation.png", "neighbours.png", "pairs.png", "report.json", "report.md"
    ]  # fmt: skip
    assert whole["json"] == whole["report"].to_dict()
    text = (out / "report.md").read_text()
    for path in out.glob("*.png"):
        assert f"({path.name})" in text
        with Image.open(path) as picture:
            assert picture.width > 600


def test_both_copies_are_flagged_and_traced(whole: dict[str, Any]) -> None:
    found = whole["json"]["memorisation"]
    flagged = {pair["name"]: pair["train"] for pair in found["generated"] if pair["flagged"]}
    assert {"p00000": "p00003", "p00001": "p00007"}.items() <= flagged.items()
    mirrored = next(pair for pair in found["generated"] if pair["name"] == "p00001")
    assert mirrored["turn"] == 4
    assert mirrored["distance"] < 0.02
    assert found["flagged_share"]["n"] == 12
    assert found["auth_pct"]["value"] <= 100 * 10 / 12


def test_scores_with_too_few_pairs_are_refused_with_their_reason(whole: dict[str, Any]) -> None:
    content = whole["json"]
    for measures in (content["fidelity"]["kid"], content["fidelity"]["fid"], content["diversity"]["coverage"]):
        for score in measures.values():
            assert score["value"] is None
            assert "are needed" in score["refused"]
            assert score["n"] == 12
    text = (whole["out"] / "report.md").read_text()
    assert "KID CF, KID FA, KID joint: 12 pairs against 22; 50 are needed on both sides" in text


def test_alignment_is_that_of_the_alignment_recipe(
    whole: dict[str, Any], sets: dict[str, Path], base_folder: Path
) -> None:
    from cffa_core.recipes.evaluate import evaluate_alignment

    alone = evaluate_alignment(sets["made"], reference=sets["real"], base=str(base_folder)).to_dict()
    assert whole["json"]["alignment"] == alone


def test_every_stage_tells_its_progress(whole: dict[str, Any]) -> None:
    stages = list(dict.fromkeys(stage for stage, _, _ in whole["told"]))
    assert stages == ["pairs", "reference", "training pairs", "neighbours", "fidelity", "diversity"]
    totals = {"pairs": 12, "reference": 22, "training pairs": 24, "neighbours": 34, "fidelity": 6, "diversity": 3}
    for stage, total in totals.items():
        assert [(done, of) for name, done, of in whole["told"] if name == stage] == [
            (done, total) for done in range(1, total + 1)
        ]


def test_without_training_pairs_and_base(sets: dict[str, Path], tmp_path: Path) -> None:
    """``max_pairs`` chooses, with its seed; nothing is said about memorisation."""
    report = evaluate_pairs(sets["made"], reference=sets["real"], base=None, out=tmp_path, max_pairs=5, seed=3)
    content = report.to_dict()
    assert content["memorisation"] is None
    assert content["train"] is None
    assert content["alignment"]["vae"] is None
    assert (content["pairs"]["pairs"], content["pairs"]["available"]) == (5, 12)
    assert (content["reference"]["pairs"], content["reference"]["available"]) == (5, 22)
    assert not (tmp_path / "neighbours.png").exists()
    assert "Not measured" in (tmp_path / "report.md").read_text()


def test_bad_input_is_a_typed_error_before_anything_is_read(sets: dict[str, Path], tmp_path: Path) -> None:
    def told(*_: object) -> None:
        raise AssertionError("pairs were read")

    with pytest.raises(InvalidSpec):
        evaluate_pairs(sets["made"], reference=sets["real"], extractor="inception", on_progress=told)
    with pytest.raises(ModelUnavailable):
        evaluate_pairs(
            sets["made"], reference=sets["real"], extractor="vit", extractor_folder=tmp_path / "no", on_progress=told
        )
    with pytest.raises(ModelUnavailable):
        evaluate_pairs(sets["made"], reference=sets["real"], base=str(tmp_path / "absent"), on_progress=told)
    with pytest.raises(InvalidDataset):
        evaluate_pairs(sets["made"], reference=tmp_path, base=None, on_progress=told)
    with pytest.raises(InvalidDataset):
        evaluate_pairs(sets["made"], reference=sets["real"], train=tmp_path, base=None, on_progress=told)


class TestCommand:
    """``cffa evaluate pairs``."""

    def test_json_is_the_report(self, sets: dict[str, Path], tmp_path: Path) -> None:
        options = ["--reference", str(sets["real"]), "--base", "", "--max-pairs", "4", "--out", str(tmp_path), "--json"]
        result = CliRunner().invoke(app, ["evaluate", "pairs", str(sets["made"]), *options, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == json.loads((tmp_path / "report.json").read_text())

    def test_tables_and_refusals_for_people(self, sets: dict[str, Path]) -> None:
        options = ["--reference", str(sets["real"]), "--base", "", "--max-pairs", "4", "--device", "cpu"]
        result = CliRunner().invoke(app, ["evaluate", "pairs", str(sets["made"]), *options])
        assert result.exit_code == 0, result.output
        for text in ("ridge correlation", "KID", "coverage"):
            assert text in result.stdout
        assert "50 are needed on both sides" in result.stderr

    def test_an_unknown_extractor_is_one_line(self, sets: dict[str, Path]) -> None:
        options = ["--reference", str(sets["real"]), "--extractor", "inception", "--device", "cpu"]
        result = CliRunner().invoke(app, ["evaluate", "pairs", str(sets["made"]), *options])
        assert result.exit_code == 1
        assert "choose one of filters, vit" in " ".join(result.stderr.split())
        assert "Traceback" not in result.stderr
