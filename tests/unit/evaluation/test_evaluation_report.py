"""The report of everything and its pictures: each number with its N, each refusal with its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cffa_core.data.contracts import PairImages
from cffa_core.evaluation import pictures
from cffa_core.evaluation.alignment import ScoredPair, ScoredSet
from cffa_core.evaluation.bootstrap import Estimate, Score
from cffa_core.evaluation.evaluation_report import EvaluationReport, TrainingSet
from cffa_core.evaluation.features import SPACES
from cffa_core.evaluation.memorisation import Match, Memorisation, turned
from cffa_core.evaluation.report import AlignmentReport, Subject
from cffa_core.evaluation.scores import SCORES

COUNT = 7


def scored(level: float) -> ScoredSet:
    pairs = [
        ScoredPair(f"p{i}", f"e{i}", dict.fromkeys(SCORES, level + i / 100), dict.fromkeys(SCORES, 0.1))
        for i in range(COUNT)
    ]
    return ScoredSet(tuple(pairs), 0)


def score(value: float | None) -> Score:
    if value is None:
        return Score(COUNT, refused="7 pairs; 50 are needed", detail={"n_reference": 9})
    return Score(COUNT, Estimate(value, value - 0.1, value + 0.1, COUNT, COUNT), detail={"n_reference": 9})


def match(index: int, distance: float, turn: int = 0) -> Match:
    return Match(index, distance, turn, (0.0, 1 / 64))


FOUND = Memorisation(
    generated=tuple(match(i % 3, 0.1 * i, turn=i) for i in range(COUNT)),
    held_out=tuple(match(0, 0.5) for _ in range(COUNT)),
    threshold=0.15,
    flagged=(True, True, *(False,) * 5),
    flagged_share=score(2 / 7),
    auth_pct=score(60.0),
    copies=0,
)


def report(memorisation: Memorisation | None = FOUND) -> EvaluationReport:
    subject, reference = Subject("made", "a" * 64, 12, scored(0.4)), Subject("real", "b" * 64, COUNT, scored(0.6))
    return EvaluationReport(
        alignment=AlignmentReport(subject, reference),
        reference=reference,
        extractor={"name": "filters", "sha256": "c" * 64, "cf": 65, "fa": 47},
        fidelity={"kid": dict.fromkeys(SPACES, score(0.5)), "fid": dict.fromkeys(SPACES, score(None))},
        diversity={
            "density": dict.fromkeys(SPACES, score(0.9)),
            "coverage": dict.fromkeys(SPACES, score(0.8)),
            "vendi": dict.fromkeys(SPACES, score(5.0)),
            "vendi_reference": dict.fromkeys(SPACES, score(6.0)),
        },
        train=None if memorisation is None else TrainingSet("learnt", "d" * 64, ("t0", "t1", "t2")),
        memorisation=memorisation,
    )


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


@pytest.fixture
def previews() -> list[pictures.Preview]:
    random = np.random.default_rng(0)
    made = []
    for _ in range(COUNT):
        grey = random.integers(0, 255, (40, 60), dtype=np.uint8)
        seen = np.ones((40, 60), bool)
        made.append(pictures.preview(PairImages(np.repeat(grey[..., None], 3, axis=2), grey, seen, seen)))
    return made


def test_json_holds_every_number_with_n_interval_and_reason() -> None:
    content = report().to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content["format"] == "cffa-evaluation/1"
    numbers = [*content["fidelity"].values(), *content["diversity"].values()]
    for entry in [space for scores in numbers for space in scores.values()]:
        assert entry["n"] == COUNT
        assert (entry["value"] is None) == (entry["refused"] is not None) == (entry["low"] is None)
    assert content["fidelity"]["fid"]["cf"]["refused"] == "7 pairs; 50 are needed"
    assert content["memorisation"]["generated"][1] == {
        "name": "p1", "train": "t1", "distance": 0.1, "turn": 1, "shift": [0.0, 0.0156], "flagged": True
    }  # fmt: skip
    assert content["memorisation"]["flagged_share"]["value"] == pytest.approx(2 / 7, abs=1e-6)
    assert content["pairs"]["available"] == 12
    assert content["reference"] == {
        "source": "real", "digest": "b" * 64, "available": 7, "pairs": 7, "eyes": 7, "resampled_by": "eye"
    }  # fmt: skip
    assert content["train"]["pairs"] == 3
    assert content["extractor"]["sha256"] == "c" * 64


def test_the_table_and_the_refusals() -> None:
    rows = report().table()
    assert {tuple(row) for row in rows} == {("score", "N", "CF", "FA", "joint")}
    assert [row["score"] for row in rows] == [
        "KID", "FID", "density", "coverage", "Vendi", "Vendi of the reference", "flagged share", "AuthPct"
    ]  # fmt: skip
    assert rows[0]["CF"] == "0.50 [0.40, 0.60]"
    assert rows[1]["joint"] == "refused"
    assert report().refusals() == ["FID CF, FID FA, FID joint: 7 pairs; 50 are needed"]


def test_the_markdown_names_its_pictures_and_says_what_was_not_measured() -> None:
    text = report().markdown({"alignment": "alignment.png", "neighbours": "neighbours.png"})
    assert "(alignment.png)" in text
    assert "(neighbours.png)" in text
    assert "(pairs.png)" not in text
    assert "| KID | 7 | 0.50 [0.40, 0.60] |" in text
    assert "FID CF, FID FA, FID joint: 7 pairs; 50 are needed" in text
    assert "| training | `learnt` | 3 |" in text
    bare = report(None)
    assert "Not measured: the training pairs were not named" in bare.markdown({})
    assert bare.to_dict()["memorisation"] is None
    assert len(bare.table()) == 6


def test_the_report_says_by_what_intervals_are_resampled() -> None:
    assert "Intervals are 95 %, over eyes. " in report().markdown({})
    known = ScoredSet(scored(0.6).pairs, 0, {f"e{i}": f"patient {i // 2}" for i in range(5)})
    reference = Subject("real", "b" * 64, COUNT, known)
    found = replace(report(), reference=reference, alignment=AlignmentReport(report().alignment.pairs, reference))
    text, content = found.markdown({}), found.to_dict()
    assert "Intervals are 95 %, over patients of the reference, where they are known, and over eyes elsewhere." in text
    assert "reference of 7 pairs, 7 eyes of 3 known patients" in text
    assert "| reference | `real` | 7 | 7 of 3 known patients |" in text and "| pairs | `made` | 7 of 12 | 7 |" in text
    assert (content["pairs"]["resampled_by"], content["reference"]["resampled_by"]) == ("eye", "patient")
    assert content["reference"]["patients"] == content["alignment"]["ceiling"]["patients"] == 3
    entry = content["alignment"]["scores"]["ngf"]
    assert (entry["ceiling"]["n"], entry["ceiling"]["eyes"], entry["ceiling"]["patients"]) == (7, 7, 3)
    assert "patients" not in entry["true"] and "patients" not in content["pairs"]


class TestPictures:
    """What is drawn."""

    def test_best_median_and_worst_are_each_shown_once(self) -> None:
        ranked = pictures.ranked_pairs(scored(0.4))
        assert ranked == [("best", 6), ("best", 5), ("median", 4), ("median", 3), ("worst", 1), ("worst", 0)]
        few = ScoredSet(scored(0.4).pairs[:2], 0)
        assert [index for _, index in pictures.ranked_pairs(few)] == [1, 0]
        none = ScoredSet((ScoredPair("p", "e", None, None),), 0)
        assert pictures.ranked_pairs(none) == []

    def test_sheets_are_written(self, tmp_path: Path, previews: list[pictures.Preview]) -> None:
        names, trained = [f"p{i}" for i in range(COUNT)], ["t0", "t1", "a-very-long-name-of-a-training-pair"]
        sheet = pictures.draw_pairs(scored(0.4), previews, tmp_path / "pairs.png")
        assert sheet is not None
        assert size(sheet)[0] > 700
        path = pictures.draw_neighbours(FOUND, names, previews, trained, previews[:3], tmp_path / "n.png")
        assert size(path)[1] > COUNT * 200
        assert size(pictures.draw_distances(FOUND, tmp_path / "d.png"))[0] == 900
        none = ScoredSet((ScoredPair("p", "e", None, None),), 0)
        assert pictures.draw_pairs(none, previews, tmp_path / "none.png") is None
        assert not (tmp_path / "none.png").exists()

    @pytest.mark.parametrize("turn", range(8))
    def test_a_training_picture_is_turned_like_the_copy(self, turn: int) -> None:
        """A copy which the search turned by ``turn`` to find its original looks like the original turned back."""
        original = np.arange(24, dtype=np.uint8).reshape(4, 6)
        copy = pictures.back(original, match(0, 0.0, turn))
        np.testing.assert_array_equal(turned(copy, turn), original)
        colour = np.stack([original] * 3, axis=-1)
        assert pictures.back(colour, match(0, 0.0, turn)).shape == (*copy.shape, 3)

    def test_a_preview_keeps_its_proportions(self, previews: list[pictures.Preview]) -> None:
        assert previews[0].cf().shape == (40, 60, 3)
        big = np.zeros((900, 1200), np.uint8)
        seen = np.ones(big.shape, bool)
        small = pictures.preview(PairImages(np.zeros((900, 1200, 3), np.uint8), big, seen, seen))
        assert small.fa().shape == (240, 320)
