"""Density, coverage and the Vendi score: their formulas, their refusals, and that they see mode collapse."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cffa_core.evaluation.bootstrap import Score
from cffa_core.evaluation.diversity import MEASURES, density_coverage, diversity, prdc, vendi
from cffa_core.evaluation.features import SPACES, FeatureSet

Damaged = Callable[..., FeatureSet]


def rows(count: int, dimension: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, dimension))


def value(score: Score) -> float:
    assert score.estimate is not None, score.refused
    return score.estimate.value


class TestDensityCoverage:
    """Balls around real pairs."""

    def test_against_the_definition(self, capsys: pytest.CaptureFixture[str]) -> None:
        real, made = rows(25), rows(30, seed=1)
        distance = [[float(np.linalg.norm(r - s)) for s in real] for r in real]
        radius = [sorted(line)[5] for line in distance]
        inside = [[np.linalg.norm(r - g) < radius[i] for g in made] for i, r in enumerate(real)]
        density, coverage = prdc(made, real)
        assert density == pytest.approx(np.sum(inside) / 5 / 30)
        assert coverage == pytest.approx(np.any(inside, axis=1).mean())
        assert capsys.readouterr().out == ""

    def test_the_interval_is_around_the_value(self) -> None:
        names = tuple(map(str, range(60)))
        for score in density_coverage(rows(60), rows(60, seed=1), names, names, seed=0, label="x"):
            assert score.estimate is not None
            assert score.estimate.low is not None
            assert score.estimate.high is not None
            assert score.estimate.low < score.estimate.value < score.estimate.high
            assert score.estimate.high - score.estimate.low < 0.8

    def test_the_same_distribution_is_covered_at_any_size(self) -> None:
        for count in (24, 60, 200):
            found = [prdc(rows(count, seed=2 * s), rows(count, seed=2 * s + 1)) for s in range(5)]
            assert np.mean([coverage for _, coverage in found]) == pytest.approx(0.97, abs=0.04)
            assert np.mean([density for density, _ in found]) == pytest.approx(1, abs=0.15)


class TestVendi:
    """The effective number of different items."""

    @pytest.mark.parametrize("groups", [1, 2, 5, 10])
    def test_groups_of_copies_count_once_each(self, groups: int) -> None:
        unit = np.eye(groups)[np.arange(20) % groups]
        assert vendi(unit @ unit.T) == pytest.approx(groups)

    def test_unequal_groups_count_as_the_exponential_of_their_entropy(self) -> None:
        unit = np.eye(2)[[0] * 15 + [1] * 5]
        wanted = np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
        assert vendi(unit @ unit.T) == pytest.approx(wanted)


def only(found: FeatureSet, chosen: np.ndarray) -> FeatureSet:
    """The set with these pairs."""
    eyes = tuple(f"e{index}" for index in range(len(chosen)))
    return FeatureSet(found.extractor, found.sha256, eyes, found.cf[chosen], found.fa[chosen])


class TestCollapse:
    """Procedural pairs of which only a few different ones are left."""

    def test_fewer_different_pairs_cover_less_and_count_less(self, generated: Damaged, reference: FeatureSet) -> None:
        whole = generated("none")
        covered = [diversity(only(whole, np.arange(50) % modes), reference) for modes in (2, 8, 24, 50)]
        for space in SPACES:
            for measure in ("coverage", "vendi"):
                series = [value(found[measure][space]) for found in covered]
                assert series == sorted(series), (measure, space, series)
                assert series[0] < 0.6 * series[-1]
            assert value(covered[0]["vendi"][space]) <= 2 + 1e-6
            same = [value(found["vendi_reference"][space]) for found in covered]
            assert len(set(same)) == 1
            assert value(covered[-1]["vendi"][space]) == pytest.approx(same[0], rel=0.3)

    def test_blurred_pairs_are_not_dense(self, generated: Damaged, reference: FeatureSet) -> None:
        found = [diversity(features, reference)["density"] for features in (generated("none"), generated("blur", 1))]
        for space in SPACES:
            assert value(found[1][space]) < 0.5 * value(found[0][space])


def test_refused_below_twenty_on_either_side(reference: FeatureSet) -> None:
    few, enough = only(reference, np.arange(19)), only(reference, np.arange(20))
    for a, b in ((few, enough), (enough, few)):
        for measure in MEASURES:
            for space in SPACES:
                score = diversity(a, b)[measure][space]
                assert score.estimate is None
                assert "20 are needed" in str(score.refused)
    assert diversity(enough, enough)["coverage"]["joint"].refused is None
