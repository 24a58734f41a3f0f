"""Floors, ceilings and the normalised score, on sets whose alignment is known."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cffa_core.data.contracts import PairImages
from cffa_core.data.ingest import check
from cffa_core.evaluation.alignment import ScoredPair, ScoredSet, normalised, score_set, shuffle_by_eye
from cffa_core.evaluation.bootstrap import median, p95
from cffa_core.evaluation.scores import HIGHER_IS_BETTER, SCORES, SHIFT

REAL_EYES = r"^(u\d)-|^(m03)[248]$"


def made_up(true: np.ndarray, floor: np.ndarray, seed: int = 0) -> ScoredSet:
    """A scored set with one number for all scores."""
    rows = zip(true, floor, strict=True)
    return ScoredSet(
        tuple(
            ScoredPair(f"p{i}", f"e{i}", dict.fromkeys(SCORES, float(t)), dict.fromkeys(SCORES, float(f)))
            for i, (t, f) in enumerate(rows)
        ),
        seed,
    )


class TestShuffle:
    """Partners of other eyes."""

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("eyes", ["ab", "aabb", "abcdefgh", "aaabbc", "aabbcc", "aaaabbbcd"])
    def test_a_permutation_without_any_pair_of_its_own_eye(self, eyes: str, seed: int) -> None:
        partner = shuffle_by_eye(list(eyes), seed)
        assert partner is not None
        assert sorted(partner) == list(range(len(eyes)))
        assert all(eyes[i] != eyes[j] for i, j in enumerate(partner))

    def test_one_eye_with_more_than_half_of_the_pairs(self) -> None:
        eyes = list("aaaaabc")
        partner = shuffle_by_eye(eyes, 0)
        assert partner is not None
        assert all(eyes[i] != eyes[j] for i, j in enumerate(partner))

    def test_one_eye_has_no_floor(self) -> None:
        assert shuffle_by_eye(["a", "a"], 0) is None

    def test_the_seed_decides(self) -> None:
        eyes = list("abcdefghij")
        assert shuffle_by_eye(eyes, 1) == shuffle_by_eye(eyes, 1)
        assert len({tuple(shuffle_by_eye(eyes, seed) or []) for seed in range(10)}) > 5


class TestNormalised:
    """A = (S_gen - floor) / (S_real - floor)."""

    random = np.random.default_rng(0)

    def test_half_of_the_real_alignment(self) -> None:
        real = made_up(0.9 + self.random.normal(0, 0.05, 60), 0.1 + self.random.normal(0, 0.02, 60))
        generated = made_up(0.6 + self.random.normal(0, 0.05, 80), 0.2 + self.random.normal(0, 0.02, 80), seed=1)
        value, reason = normalised(generated, real, "ngf")
        assert reason is None
        assert value is not None
        assert value.value == pytest.approx(0.5, abs=0.03)
        assert value.low is not None
        assert value.high is not None
        # Delta method: relative variances of numerator and denominator add.
        spread = (
            np.hypot(np.hypot(0.05, 0.02) / np.sqrt(80) / 0.4, np.hypot(0.05, 0.02) / np.sqrt(60) / 0.8) * value.value
        )
        assert value.high - value.low == pytest.approx(2 * 1.96 * spread, rel=0.3)

    def test_a_collapsed_set_scores_nothing(self) -> None:
        """All pairs the same: true and shuffled are equal, however well they fit."""
        collapsed = made_up(np.full(20, 0.9), np.full(20, 0.9))
        real = made_up(0.9 + self.random.normal(0, 0.05, 30), np.full(30, 0.1))
        value, _ = normalised(collapsed, real, "vessel_dice")
        assert value is not None
        assert value.value == 0

    def test_omitted_where_real_pairs_do_not_stand_out(self) -> None:
        noise = self.random.normal(0, 1, 25)
        value, reason = normalised(made_up(noise + 1, noise), made_up(noise, noise[::-1]), "ngf")
        assert value is None
        assert reason is not None
        assert "standard errors" in reason

    def test_two_patients_are_too_few_for_a_ceiling_whatever_their_eyes(self) -> None:
        made = made_up(np.ones(5), np.zeros(5))
        real = ScoredSet(made.pairs[:4], 0, {"e0": "a", "e1": "a", "e2": "b", "e3": "b"})
        assert normalised(made, replace(real, patients={}), "ngf")[0] is not None
        assert "2 patients" in str(normalised(made, real, "ngf")[1])

    def test_a_real_sets_patients_widen_the_interval_of_a(self) -> None:
        above = np.repeat(self.random.normal(1, 0.2, 12), 2)
        real, made = made_up(above, np.zeros(24)), made_up(np.full(24, 0.5), np.zeros(24))
        by_patient = replace(real, patients={f"e{i}": f"p{i // 2}" for i in range(24)})
        one, other = (normalised(made, whose, "ngf")[0] for whose in (real, by_patient))
        assert one is not None and other is not None and one.value == other.value
        assert one.low is not None and one.high is not None and other.low is not None and other.high is not None
        assert other.high - other.low > 1.2 * (one.high - one.low)

    def test_omitted_without_a_floor_or_with_few_eyes(self) -> None:
        one_eye = ScoredSet((ScoredPair("p", "e", dict.fromkeys(SCORES, 1.0), None),), 0)
        many = made_up(np.ones(5), np.zeros(5))
        assert "floor" in str(normalised(one_eye, many, "ngf")[1])
        assert "eyes" in str(normalised(many, made_up(np.ones(2), np.zeros(2)), "ngf")[1])


class TestScoreSet:
    """Whole sets of procedural pairs."""

    def test_the_order_of_pairs_and_the_neighbours_do_not_change_true_scores(self, phantoms: list[PairImages]) -> None:
        named = [(f"p{i}", f"e{i}", images) for i, images in enumerate(phantoms[:3])]
        forth, back = score_set(named), score_set(named[::-1])
        assert {p.name: p.true for p in forth.pairs} == {p.name: p.true for p in back.pairs}

    def test_one_eye_is_scored_without_a_floor(self, phantoms: list[PairImages]) -> None:
        scored = score_set([(f"p{i}", "e", images) for i, images in enumerate(phantoms[:2])])
        assert scored.estimate("ngf", shuffled=True) is None
        assert scored.estimate("ngf") is not None

    def test_copies_of_one_image_score_as_their_floor(self, phantoms: list[PairImages]) -> None:
        scored = score_set([(f"p{i}", f"e{i}", phantoms[0]) for i in range(3)])
        for score in SCORES:
            assert scored.differences(score)[0] == pytest.approx([0, 0, 0])

    def test_a_pair_that_shares_nothing_is_left_out(self, phantoms: list[PairImages]) -> None:
        nothing = np.zeros_like(phantoms[0].valid_fa)
        apart = PairImages(phantoms[0].cf, phantoms[0].fa, phantoms[0].valid_cf, nothing)
        named = [("apart", "a", apart), *((f"p{i}", f"e{i}", images) for i, images in enumerate(phantoms[:2]))]
        scored = score_set(named)
        assert scored.pairs[0].true is None
        found = scored.estimate("ngf")
        assert found is not None
        assert found.n == 2


@pytest.mark.realdata
def test_real_pairs_separate_from_shuffled_ones(real_data: Path) -> None:
    """Measured independently: ridge correlation 0.56 against 0.00, vessel Dice 0.55 against 0.12."""
    checked = check(real_data / "real_pairs", eye_pattern=REAL_EYES)
    scored = score_set((pair.name, pair.eye, images) for pair, images in checked.decoded())
    assert (len(scored.pairs), scored.eyes) == (26, 11)

    def value(score: str, shuffled: bool = False) -> float:
        found = scored.estimate(score, shuffled=shuffled)
        assert found is not None
        return found.value

    assert value("ridge_correlation") > 0.45
    assert abs(value("ridge_correlation", shuffled=True)) < 0.08
    assert value("vessel_dice") == pytest.approx(0.55, abs=0.05)
    assert value("vessel_dice", shuffled=True) == pytest.approx(0.12, abs=0.02)
    for score, (difference, _) in itertools.product(HIGHER_IS_BETTER, [scored.differences("ngf")]):
        assert (difference > 0).all()
        assert (scored.differences(score)[0] > 0).all(), score
    shift, far = scored.estimate(SHIFT, median), scored.estimate(SHIFT, p95)
    assert shift is not None
    assert far is not None
    assert shift.value < 1.5
    assert far.value < 5
    itself, _ = normalised(scored, scored, "ridge_correlation")
    assert itself is not None
    assert itself.value == 1
