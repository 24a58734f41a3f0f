"""The report: its JSON, its table and its picture say the same."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cffa_core.evaluation import figure
from cffa_core.evaluation.alignment import ScoredPair, ScoredSet
from cffa_core.evaluation.bootstrap import Estimate
from cffa_core.evaluation.report import AlignmentReport, Subject, VaeCeiling
from cffa_core.evaluation.scores import HIGHER_IS_BETTER, SCORES, SHIFT


def subject(level: float, floor: float, n: int = 8, seed: int = 0) -> Subject:
    random = np.random.default_rng(seed)

    def scores(value: float) -> dict[str, float]:
        return {score: (30 if score == SHIFT else 1) * float(value + random.normal(0, 0.02)) for score in SCORES}

    pairs = tuple(ScoredPair(f"p{i}", f"e{i}", scores(level), scores(floor)) for i in range(n))
    return Subject("set", "d" * 64, n + 4, ScoredSet(pairs, seed))


FULL = AlignmentReport(
    subject(0.5, 0.1),
    subject(0.9, 0.1, seed=1),
    VaeCeiling("tiny", "b" * 64, Estimate(0.8, 0.75, 0.85, 8, 8), Estimate(0.7, None, None, 8, 2)),
)


def test_json_has_every_number_with_its_n() -> None:
    content = FULL.to_dict()
    assert json.loads(json.dumps(content)) == content
    for score in HIGHER_IS_BETTER:
        entry = content["scores"][score]
        assert entry["normalised"]["value"] == pytest.approx(0.5, abs=0.05)
        assert entry["normalised_omitted"] is None
        for key in ("true", "shuffled", "ceiling", "ceiling_shuffled", "normalised"):
            assert entry[key]["low"] < entry[key]["value"] < entry[key]["high"]
            assert entry[key]["n"] == 8
    assert set(content["residual_shift_px"]) == {"median", "p95"}
    assert "normalised" not in content["residual_shift_px"]["median"]
    assert content["vae"]["vessel_dice"]["fa"] == {"value": 0.7, "low": None, "high": None, "n": 8, "eyes": 2}
    assert content["pairs"]["available"] == 12
    assert len(content["per_pair"]) == 8


def test_the_table_has_the_same_columns_in_every_row() -> None:
    rows = FULL.table()
    assert {tuple(row) for row in rows} == {("score", "N", "true", "shuffled", "ceiling", "ceiling shuffled", "A")}
    assert [row["score"] for row in rows][-4:] == [
        "residual shift px, median",
        "residual shift px, p95",
        "VAE round trip (tiny), vessel Dice CF",
        "VAE round trip (tiny), vessel Dice FA",
    ]
    assert rows[-2]["ceiling"] == "0.80 [0.75, 0.85]"
    assert rows[-1]["ceiling"] == "0.70"
    assert rows[0]["A"].startswith("0.")


def test_without_a_reference_there_is_no_a() -> None:
    report = AlignmentReport(subject(0.5, 0.1))
    assert all(row["A"].startswith("-") and row["ceiling"] == "-" for row in report.table())
    assert report.to_dict()["scores"]["ngf"]["normalised_omitted"] == "no reference"
    assert report.to_dict()["ceiling"] is None


def test_the_picture_shows_true_and_shuffled_apart() -> None:
    image = np.asarray(figure.draw(FULL))
    first = image[36:396, :300]
    heights = [
        np.argwhere((first == colour).all(axis=-1))[:, 0].mean()
        for colour in ((21, 101, 192), (150, 150, 158), (46, 125, 50))
    ]
    true, shuffled, ceiling = heights
    assert ceiling < true < shuffled  # rows count from the top


def test_a_set_of_one_eye_can_be_drawn() -> None:
    lone = ScoredSet((ScoredPair("p", "e", dict.fromkeys(SCORES, 0.0), None),), 0)
    assert figure.draw(AlignmentReport(Subject("set", "d", 1, lone))).size[0] == 900
