"""Estimates with intervals, resampled by PATIENT or by EYE, and scores: an estimate or the reason why there is none.

Crops of one eye are not independent, nor are both eyes of one patient. So whole patients are drawn, and whole eyes
where no patient is known (cluster bootstrap). Statistics that duplicates would distort (distances to neighbours, KID,
Vendi) take random halves without replacement instead. Knows numbers and names only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from cffa_core.data.contracts import undivided
from cffa_core.rng import derive_seed

DRAWS = 1000
LEVEL = 0.95
HALVES = 100
MIN_WHOLE = 3  # with fewer patients, or eyes, an interval would say nothing

Values = npt.NDArray[np.float64]
Statistic = Callable[[Values], float]


@dataclass(frozen=True)
class Eyes:
    """The eye of each of N pairs, and the patient of each eye as far as one is known.

    ``patients`` maps names of eyes to names of patients; eyes that are in none of the N pairs may stand in it.
    """

    names: tuple[str, ...]
    patients: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, eyes: Whose) -> Self:
        """Eyes equal to ``eyes``, or those of a sequence of N names, one for each pair, of whom no patient is known.

        Order and repetitions stay. Nothing is checked or raised: a bare string would be taken for a name per character.
        """
        return cls(eyes.names, eyes.patients) if isinstance(eyes, Eyes) else cls(tuple(eyes))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def whole(self) -> list[str]:
        """For each pair the name of what is drawn whole with it: its patient, or its eye."""
        return [undivided(eye, self.patients.get(eye)) for eye in self.names]

    @property
    def different(self) -> int:
        """Number of different eyes."""
        return len(set(self.names))

    @property
    def known_patients(self) -> int | None:
        """Number of different patients; None if none is known."""
        return len({self.patients[eye] for eye in self.names if eye in self.patients}) or None

    @property
    def drawn_from(self) -> int:
        """How many patients, and eyes of unknown ones, there are to draw from."""
        return len(set(self.whole))


Whose: TypeAlias = Eyes | Sequence[str]
"""Whose each pair is: eyes with their patients, or the names of eyes alone."""


@dataclass(frozen=True)
class Estimate:
    """A value over ``n`` pairs of ``eyes`` eyes, with its 95 % bootstrap interval (None with fewer than 3 eyes).

    ``patients`` of them are known, if any is; then patients are drawn, and 3 of them (or eyes of others) are needed.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    eyes: int
    patients: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``patients`` if any is known; rounded to six digits: the last bits of a sum do not show."""
        low, high = (None if end is None else round(end, 6) for end in (self.low, self.high))
        found = {"value": round(self.value, 6), "low": low, "high": high, "n": self.n, "eyes": self.eyes}
        return found if self.patients is None else {**found, "patients": self.patients}


def mean(values: Values) -> float:
    """Arithmetic mean."""
    return float(values.mean())


def median(values: Values) -> float:
    """Median."""
    return float(np.median(values))


def p95(values: Values) -> float:
    """95th percentile."""
    return float(np.percentile(values, 95))


def draws(values: Values, eyes: Whose, statistic: Statistic, *, seed: int, label: str) -> Values:
    """The statistic of :data:`DRAWS` resamples by patient, or eye; the same seed and label draw the same ones."""
    whole = Eyes.of(eyes).whole
    groups = [values[[name == chosen for name in whole]] for chosen in sorted(set(whole))]
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


def estimate(values: Values, eyes: Whose, statistic: Statistic = mean, *, seed: int = 0, label: str = "") -> Estimate:
    """Estimate of a statistic with its interval. Raises ``ValueError`` for no values."""
    if len(values) == 0:
        raise ValueError("no values to estimate from")
    whose = Eyes.of(eyes)
    low: float | None = None
    high: float | None = None
    if whose.drawn_from >= MIN_WHOLE:
        low, high = interval(draws(values, whose, statistic, seed=seed, label=label))
    return Estimate(statistic(values), low, high, len(values), whose.different, whose.known_patients)


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


def half_samples(eyes: Whose, size: int, *, seed: int, label: str) -> npt.NDArray[np.intp]:
    """Indices (:data:`HALVES`, ``size``) of random subsets without replacement: whole patients, or eyes, until ``size``
    is reached.

    With ``size`` half of the set, a statistic's spread over them is about the sampling error of that statistic on the
    whole set (delete-half jackknife, Shao and Wu 1989). Raises ``ValueError`` if there are fewer than ``size`` pairs.
    """
    if size > len(eyes):
        raise ValueError(f"{size} of {len(eyes)} pairs cannot be drawn")
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(Eyes.of(eyes).whole):
        groups.setdefault(name, []).append(index)
    names = sorted(groups)
    rng = np.random.default_rng(derive_seed(seed, "halves", label))
    drawn = [
        np.concatenate([rng.permutation(groups[names[i]]) for i in rng.permutation(len(names))])[:size]
        for _ in range(HALVES)
    ]
    return np.array(drawn)


def fewest(*sides: Whose) -> Eyes:
    """Those of the sides of a comparison of which there are fewest to draw from: they bound what it can say."""
    return min((Eyes.of(eyes) for eyes in sides), key=lambda eyes: eyes.drawn_from)


def estimate_from_halves(
    values: Values, n: int, eyes: Whose, value: float | None = None, *, within: tuple[float, float] = (-np.inf, np.inf)
) -> Estimate:
    """Estimate of ``n`` pairs from the values on random halves of ``eyes``: their mean and their 95 % range.

    Where the statistic of the whole set is known, ``value``, it is the estimate and the range is moved onto it, but
    not beyond ``within``, the values that the statistic can have.
    """
    middle = float(values.mean())
    at, whose = middle if value is None else value, Eyes.of(eyes)
    low: float | None = None
    high: float | None = None
    if whose.drawn_from >= MIN_WHOLE:
        low, high = interval(np.clip(values - middle + at, *within))
    return Estimate(at, low, high, n, whose.different, whose.known_patients)
