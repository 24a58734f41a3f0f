"""KID and FID: their formulas, their refusals, and that they answer to what makes images worse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.linalg import sqrtm

from cffa_core.data.contracts import PairImages
from cffa_core.evaluation.bootstrap import Eyes, Score
from cffa_core.evaluation.features import SPACES, FeatureSet
from cffa_core.evaluation.fidelity import fid, fidelity, frechet_distance, kid, squared_mmd
from tests.unit.evaluation.damage import CHANGES, features_of

Damaged = Callable[..., FeatureSet]
Rows = np.ndarray


def rows(count: int, dimension: int = 6, shift: float = 0.0, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(shift, 1, (count, dimension))


def names(count: int) -> tuple[str, ...]:
    return tuple(f"e{index}" for index in range(count))


def value(score: Score) -> float:
    assert score.estimate is not None, score.refused
    return score.estimate.value


class TestKid:
    """Unbiased MMD^2 with the cubic kernel."""

    def test_against_the_definition(self) -> None:
        a, b = rows(7), rows(7, shift=0.5, seed=1)

        def kernel(x: Rows, y: Rows) -> float:
            return float((x @ y / len(x) + 1) ** 3)

        within = [np.mean([kernel(s[i], s[j]) for i in range(7) for j in range(7) if i != j]) for s in (a, b)]
        between = np.mean([kernel(x, y) for x in a for y in b])
        assert squared_mmd(a, b) == pytest.approx(within[0] + within[1] - 2 * between)

    def test_the_same_distribution_scores_about_zero_and_the_interval_covers_it(self) -> None:
        covered, found = 0, []
        for seed in range(20):
            a, b = rows(60, seed=2 * seed), rows(60, seed=2 * seed + 1)
            score = kid(a, b, names(60), names(60), seed=seed, label="x").estimate
            assert score is not None
            assert score.low is not None
            assert score.high is not None
            found.append(score.value)
            covered += score.low <= 0 <= score.high
        assert np.mean(found) == pytest.approx(0, abs=0.05)
        assert covered >= 16

    def test_refused_below_fifty_on_either_side(self) -> None:
        few, enough = rows(49), rows(50)
        for a, b in ((few, enough), (enough, few)):
            score = kid(a, b, names(len(a)), names(len(b)), seed=0, label="x")
            assert score.estimate is None
            assert "50 are needed" in str(score.refused)
            assert score.to_dict()["value"] is None
            assert score.to_dict()["n"] == len(a)
        assert kid(enough, enough, names(50), names(50), seed=0, label="x").refused is None

    def test_pairs_of_few_eyes_have_a_wider_interval(self) -> None:
        base = np.repeat(rows(10), 10, axis=0) + 0.01 * rows(100, seed=3)
        reference = rows(100, seed=4)
        wide, narrow = (
            kid(base, reference, eyes, names(100), seed=0, label="x").estimate
            for eyes in (tuple(f"e{i // 10}" for i in range(100)), names(100))
        )
        assert wide is not None
        assert narrow is not None
        assert wide.eyes == 10
        assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)  # type: ignore[operator]

    def test_halves_of_real_pairs_keep_patients_whole(self) -> None:
        base = np.repeat(rows(10), 10, axis=0) + 0.01 * rows(100, seed=3)
        eyes = Eyes(names(100), {name: f"patient {i // 10}" for i, name in enumerate(names(100))})
        ours = names(100)
        wide, narrow = (kid(rows(100, seed=4), base, ours, real, seed=0, label="x").estimate for real in (eyes, ours))
        assert wide is not None and narrow is not None
        assert (wide.eyes, wide.patients, narrow.patients) == (100, 10, None)
        assert wide.high - wide.low > 1.3 * (narrow.high - narrow.low)  # type: ignore[operator]

    def test_the_seed_decides(self) -> None:
        a, b = rows(50), rows(50, shift=1, seed=1)
        one, same, other = (kid(a, b, names(50), names(50), seed=seed, label="x").to_dict() for seed in (1, 1, 2))
        assert one == same
        assert one != other


class TestFid:
    """Distance of two Gaussians."""

    def test_against_the_definition(self) -> None:
        a, b = rows(50, 4), rows(40, 4, shift=0.7, seed=1) * np.array([1, 2, 0.5, 1])
        first, second = np.cov(a.T), np.cov(b.T)
        root = sqrtm(first @ second).real
        wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)
        assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)

    def test_refused_below_two_pairs_per_feature(self) -> None:
        few, enough = rows(11), rows(12)
        score = fid(few, enough, names(11), names(12), seed=0, label="x")
        assert score.estimate is None
        assert "12 are needed" in str(score.refused)
        found = fid(enough, enough, names(12), names(12), seed=0, label="x")
        assert found.estimate is not None
        assert found.estimate.value == pytest.approx(0, abs=1e-6)
        assert found.detail["dimension"] == 6


class TestPhantoms:
    """Procedural pairs of 96 px against other eyes of their kind."""

    def test_other_eyes_of_the_same_kind_do_not_differ(self, generated: Damaged, reference: FeatureSet) -> None:
        found = fidelity(generated("none"), reference)
        for space in SPACES:
            score = found["kid"][space].estimate
            assert score is not None
            assert score.low is not None
            assert score.high is not None
            assert score.low < 0.1
            assert score.value < 0.3
            assert "are needed" in str(found["fid"][space].refused)

    @pytest.mark.parametrize("kind", ["blur", "noise", "colour"])
    def test_the_worse_the_images_the_higher_the_kid(
        self, generated: Damaged, reference: FeatureSet, kind: str
    ) -> None:
        found = [fidelity(features, reference)["kid"] for features in growing(generated, kind)]
        for space in SPACES:
            grown = [scores[space] for scores in found]
            assert_grows(grown)
            first, last = grown[0].estimate, grown[-1].estimate
            assert first is not None
            assert last is not None
            assert last.low > first.high  # type: ignore[operator]


def growing(damaged: Damaged, kind: str) -> list[FeatureSet]:
    """None, a little, and more of one kind of damage."""
    return [damaged("none"), damaged(kind, 0), damaged(kind, 1)]


def assert_grows(scores: list[Score]) -> None:
    """Each is higher than the one before, the last one clearly."""
    series = [value(score) for score in scores]
    assert series == sorted(series), series
    assert series[-1] > series[0] + 0.1


@pytest.mark.realdata
def test_real_images_score_worse_when_they_are_damaged(real_crops: tuple[list[PairImages], list[str]]) -> None:
    pairs, eyes = real_crops
    undamaged = features_of(pairs, eyes, CHANGES["none"][0])
    for kind in ("blur", "noise", "colour"):
        series = [undamaged, features_of(pairs, eyes, CHANGES[kind][-1])]
        found = [fidelity(features, undamaged)["kid"] for features in series]
        for space in SPACES:
            assert_grows([scores[space] for scores in found])
