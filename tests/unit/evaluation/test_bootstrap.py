"""Intervals: they cover, they widen when pairs share an eye, and they are repeatable."""

from __future__ import annotations

import numpy as np
import pytest

from cffa_core.evaluation.bootstrap import (
    HALVES,
    Estimate,
    Eyes,
    Score,
    draws,
    estimate,
    estimate_from_halves,
    fewest,
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


class TestPatients:
    """Both eyes of a patient are drawn together where it is known that they are."""

    # Ten patients; the two eyes of each differ by little, and three pairs of an eye not at all.
    of_patient = np.random.default_rng(7).normal(0, 1, 10)
    values = np.repeat(of_patient, 6) + np.tile(np.repeat([0.01, -0.01], 3), 10)
    names = tuple(f"p{i // 6}_{'OD' if i % 6 < 3 else 'OS'}" for i in range(60))
    patients = {name: name.partition("_")[0] for name in names}  # noqa: RUF012

    def test_the_interval_by_patient_is_wider_than_by_eye(self) -> None:
        by_eye = estimate(self.values, Eyes(self.names))
        by_patient = estimate(self.values, Eyes(self.names, self.patients))
        assert (by_eye.n, by_eye.eyes, by_eye.patients) == (60, 20, None)
        assert (by_patient.n, by_patient.eyes, by_patient.patients) == (60, 20, 10)
        assert by_patient.value == by_eye.value
        # Twenty eyes that are ten twice over: the standard error is that of ten, larger by the root of 2.
        assert width(by_patient) / width(by_eye) == pytest.approx(np.sqrt(2), rel=0.15)
        assert width(by_patient) == pytest.approx(2 * 1.96 * self.of_patient.std() / np.sqrt(10), rel=0.15)
        assert by_patient.to_dict()["patients"] == 10 and "patients" not in by_eye.to_dict()

    def test_halves_hold_whole_patients(self) -> None:
        for half in half_samples(Eyes(self.names, self.patients), 30, seed=0, label="x"):
            assert len({self.patients[self.names[i]] for i in half}) == 5

    def test_eyes_of_unknown_patients_stand_for_themselves(self) -> None:
        some = {name: patient for name, patient in self.patients.items() if patient < "p5"}
        whose = Eyes(self.names, some)
        assert (whose.drawn_from, whose.different, whose.known_patients) == (15, 20, 5)
        alike = Eyes(("a", "b", "a"), {"b": "a"})
        assert alike.drawn_from == 2, "an eye and a patient that are called alike are two"

    def test_two_patients_give_no_interval_however_many_eyes_they_have(self) -> None:
        two = {name: patient for name, patient in self.patients.items() if patient < "p2"}
        found = estimate(self.values[:12], Eyes(self.names[:12], two))
        assert (found.low, found.eyes, found.patients) == (None, 4, 2)
        assert estimate(self.values[:12], Eyes(self.names[:12])).low is not None
        assert estimate_from_halves(self.values, 12, Eyes(self.names[:12], two)).low is None

    def test_a_comparison_is_bounded_by_its_smaller_side(self) -> None:
        real = Eyes(self.names, self.patients)
        assert fewest([f"g{i}" for i in range(15)], real) == real
        assert fewest(real, ["a", "b"]) == Eyes(("a", "b"))


def width(found: Estimate) -> float:
    assert found.low is not None and found.high is not None
    return found.high - found.low


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
        eyes = [str(i) for i in range(400)]
        found = estimate_from_halves(values[halves].mean(axis=1), 400, eyes, float(values.mean()))
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
        assert estimate_from_halves(np.array([1.0, 2.0]), 9, ["a", "b"]) == Estimate(1.5, None, None, 9, 2)
        with pytest.raises(ValueError, match="cannot be drawn"):
            half_samples(["a"], 2, seed=0, label="x")


def test_a_score_says_its_n_and_its_reason() -> None:
    refused = Score(7, refused="too few", detail={"n_reference": 3}).to_dict()
    assert refused == {
        "value": None, "low": None, "high": None, "n": 7, "eyes": None, "refused": "too few", "n_reference": 3
    }  # fmt: skip
    found = Score(7, Estimate(0.5, 0.4, 0.6, 7, 5)).to_dict()
    assert found == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 7, "eyes": 5, "refused": None}
