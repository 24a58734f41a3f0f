"""Estimates with intervals, resampled by EYE, and scores: an estimate or the reason why there is none.

Crops of one eye are not independent, so whole eyes are drawn (cluster bootstrap). Statistics that duplicates would
distort (distances to neighbours, KID, Vendi) take random halves without replacement instead. Knows numbers and group
names only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from cffa_core.rng import derive_seed

DRAWS = 1000
LEVEL = 0.95
HALVES = 100
MIN_EYES = 3  # with fewer groups an interval would say nothing

Values = npt.NDArray[np.float64]
Statistic = Callable[[Values], float]


@dataclass(frozen=True)
class Estimate:
    """A value over ``n`` pairs of ``eyes`` eyes, with its 95 % bootstrap interval (None with fewer than 3 eyes)."""

    value: float
    low: float | None
    high: float | None
    n: int
    eyes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; rounded to six digits, so that the last bits of a sum do not show."""
        low, high = (None if end is None else round(end, 6) for end in (self.low, self.high))
        return {"value": round(self.value, 6), "low": low, "high": high, "n": self.n, "eyes": self.eyes}


def mean(values: Values) -> float:
    """Arithmetic mean."""
    return float(values.mean())


def median(values: Values) -> float:
    """Median."""
    return float(np.median(values))


def p95(values: Values) -> float:
    """95th percentile."""
    return float(np.percentile(values, 95))


def draws(values: Values, eyes: Sequence[str], statistic: Statistic, *, seed: int, label: str) -> Values:
    """The statistic of :data:`DRAWS` resamples by eye; the same seed and label draw the same eyes."""
    names = sorted(set(eyes))
    groups = [values[[eye == name for eye in eyes]] for name in names]
    rng = np.random.default_rng(derive_seed(seed, "bootstrap", label))
    picks = rng.integers(len(groups), size=(DRAWS, len(groups)))
    if statistic is mean:  # the same resamples, without joining them
        sums = np.array([group.sum() for group in groups])
        sizes = np.array([len(group) for group in groups])
        return np.asarray(sums[picks].sum(axis=1) / sizes[picks].sum(axis=1))
    return np.array([statistic(np.concatenate([groups[i] for i in pick])) for pick in picks])


def interval(drawn: Values) -> tuple[float, float]:
    """Percentile interval of the draws."""
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def estimate(
    values: Values, eyes: Sequence[str], statistic: Statistic = mean, *, seed: int = 0, label: str = ""
) -> Estimate:
    """Estimate of a statistic with its interval. Raises ``ValueError`` for no values."""
    if len(values) == 0:
        raise ValueError("no values to estimate from")
    count = len(set(eyes))
    low: float | None = None
    high: float | None = None
    if count >= MIN_EYES:
        low, high = interval(draws(values, eyes, statistic, seed=seed, label=label))
    return Estimate(statistic(values), low, high, len(values), count)


@dataclass(frozen=True)
class Score:
    """An estimate, or ``refused``: the reason why there is none. ``n`` pairs stood behind it either way.

    ``detail`` holds the numbers that belong to it (sizes of the other side, of subsets, of features).
    """

    n: int
    estimate: Estimate | None = None
    refused: str | None = None
    detail: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: value, low, high (None where refused), n, eyes, refused, and the details."""
        nothing = {"value": None, "low": None, "high": None, "n": self.n, "eyes": None}
        found = nothing if self.estimate is None else self.estimate.to_dict()
        details = {name: round(value, 6) for name, value in self.detail.items()}
        return {**found, "refused": self.refused, **details}


def half_samples(eyes: Sequence[str], size: int, *, seed: int, label: str) -> npt.NDArray[np.intp]:
    """Indices (:data:`HALVES`, ``size``) of random subsets without replacement: whole eyes until ``size`` is reached.

    With ``size`` half of the set, a statistic's spread over them is about the sampling error of that statistic on the
    whole set (delete-half jackknife, Shao and Wu 1989). Raises ``ValueError`` if there are fewer than ``size`` pairs.
    """
    if size > len(eyes):
        raise ValueError(f"{size} of {len(eyes)} pairs cannot be drawn")
    groups: dict[str, list[int]] = {}
    for index, eye in enumerate(eyes):
        groups.setdefault(eye, []).append(index)
    names = sorted(groups)
    rng = np.random.default_rng(derive_seed(seed, "halves", label))
    drawn = [
        np.concatenate([rng.permutation(groups[names[i]]) for i in rng.permutation(len(names))])[:size]
        for _ in range(HALVES)
    ]
    return np.array(drawn)


def estimate_from_halves(
    values: Values, n: int, eyes: int, value: float | None = None, *, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Estimate of ``n`` pairs from the values on random halves: their mean and their 95 % range.

    Where the statistic of the whole set is known, ``value``, it is the estimate and the range is moved onto it, but
    not beyond ``within``, the values that the statistic can have.
    """
    middle = float(values.mean())
    at = middle if value is None else value
    if eyes < MIN_EYES:
        return Estimate(at, None, None, n, eyes)
    low, high = interval(np.clip(values - middle + at, *within))
    return Estimate(at, low, high, n, eyes)
