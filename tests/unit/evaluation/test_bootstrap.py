"""Intervals: they cover, they widen when pairs share an eye, and they are repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from cffa_core.evaluation.bootstrap import (
    HALVES,
    Estimate,
    Score,
    draws,
    estimate,
    estimate_from_halves,
    half_samples,
    mean,
    median,
    p95,
)


def test_the_interval_of_a_mean_is_that_of_the_normal_theory() -> None:
    values = np.random.default_rng(0).normal(5, 2, 400)
    found = estimate(values, [str(i) for i in range(400)])
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.05)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05)
    assert (found.n, found.eyes) == (400, 400)


def test_copies_of_one_eye_add_no_certainty() -> None:
    values = np.random.default_rng(0).normal(0, 1, 20)
    single = estimate(values, [str(i) for i in range(20)])
    copied = estimate(np.repeat(values, 10), [str(i) for i in np.repeat(np.arange(20), 10)])
    assert copied.value == pytest.approx(single.value)
    assert (copied.low, copied.high) == (pytest.approx(single.low), pytest.approx(single.high))
    assert copied.n == 200
    assert copied.eyes == 20


def test_the_quick_mean_equals_the_plain_one() -> None:
    values = np.random.default_rng(1).normal(0, 1, 30)
    eyes = [str(i % 7) for i in range(30)]
    slow = draws(values, eyes, lambda x: float(np.mean(x)), seed=3, label="x")
    np.testing.assert_allclose(draws(values, eyes, mean, seed=3, label="x"), slow)


def test_the_seed_and_the_label_decide() -> None:
    values, eyes = np.arange(10.0), [str(i) for i in range(10)]
    one = draws(values, eyes, mean, seed=0, label="a")
    np.testing.assert_array_equal(one, draws(values, eyes, mean, seed=0, label="a"))
    assert not np.array_equal(one, draws(values, eyes, mean, seed=0, label="b"))
    assert not np.array_equal(one, draws(values, eyes, mean, seed=1, label="a"))


def test_median_and_percentile() -> None:
    values = np.arange(101.0)
    eyes = [str(i) for i in range(101)]
    assert estimate(values, eyes, median).value == 50
    assert estimate(values, eyes, p95).value == 95
    low = estimate(values, eyes, p95).low
    assert low is not None
    assert 80 < low < 95


def test_two_eyes_give_no_interval_and_no_values_no_estimate() -> None:
    found = estimate(np.array([1.0, 2.0]), ["a", "b"])
    assert (found.value, found.low, found.high) == (1.5, None, None)
    with pytest.raises(ValueError, match="no values"):
        estimate(np.array([]), [])


class TestHalves:
    """Random halves without replacement, by eye."""

    def test_each_half_has_its_size_and_no_pair_twice(self) -> None:
        halves = half_samples([str(i) for i in range(21)], 10, seed=0, label="x")
        assert halves.shape == (HALVES, 10)
        assert all(len(set(half)) == 10 for half in halves)
        assert set(halves.ravel()) == set(range(21))

    def test_eyes_stay_together(self) -> None:
        """Four eyes of five pairs: half of the pairs are two whole eyes."""
        eyes = [str(i // 5) for i in range(20)]
        for half in half_samples(eyes, 10, seed=0, label="x"):
            assert len({eyes[i] for i in half}) == 2

    def test_the_range_over_halves_is_that_of_the_mean_of_the_whole(self) -> None:
        values = np.random.default_rng(0).normal(0, 1, 400)
        halves = half_samples([str(i) for i in range(400)], 200, seed=0, label="x")
        found = estimate_from_halves(values[halves].mean(axis=1), 400, 400, float(values.mean()))
        assert found.low is not None
        assert found.high is not None
        assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.25)
        assert found.value == pytest.approx(values.mean())

    def test_the_seed_and_the_label_decide(self) -> None:
        eyes = [str(i) for i in range(12)]
        one = half_samples(eyes, 6, seed=0, label="a")
        np.testing.assert_array_equal(one, half_samples(eyes, 6, seed=0, label="a"))
        assert not np.array_equal(one, half_samples(eyes, 6, seed=1, label="a"))
        assert not np.array_equal(one, half_samples(eyes, 6, seed=0, label="b"))

    def test_few_eyes_give_no_interval_and_too_few_pairs_no_halves(self) -> None:
        assert estimate_from_halves(np.array([1.0, 2.0]), 9, 2) == Estimate(1.5, None, None, 9, 2)
        with pytest.raises(ValueError, match="cannot be drawn"):
            half_samples(["a"], 2, seed=0, label="x")


def test_a_score_says_its_n_and_its_reason() -> None:
    refused = Score(7, refused="too few", detail={"n_reference": 3}).to_dict()
    assert refused == {
        "value": None, "low": None, "high": None, "n": 7, "eyes": None, "refused": "too few", "n_reference": 3
    }  # fmt: skip
    found = Score(7, Estimate(0.5, 0.4, 0.6, 7, 5)).to_dict()
    assert found == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 7, "eyes": 5, "refused": None}
