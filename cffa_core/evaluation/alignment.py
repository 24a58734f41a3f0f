"""Alignment of a set of pairs, between a floor and a ceiling (METHODS 8).

Floor: CF of one pair against FA of another EYE of the same set. Ceiling: real pairs, scored and shuffled the same way.
Each set has its own floor, or mode collapse would score as alignment. Knows neither files nor models;
``recipes.evaluate`` does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cffa_core.data.contracts import PairImages
from cffa_core.evaluation.bootstrap import MIN_WHOLE, Estimate, Eyes, Statistic, Values, draws, estimate, interval, mean
from cffa_core.evaluation.scores import SCORES, Features, compare, pair_features
from cffa_core.rng import derive_seed

REPEATS = 3
MIN_STANDARD_ERRORS = 3.0
ATTEMPTS = 50


@dataclass(frozen=True)
class ScoredPair:
    """Scores of one pair as it is (``true``), and the mean scores of its CF with FAs of other eyes (``shuffled``).

    Either is None where too little was seen in common, ``shuffled`` also where the set has one eye only.
    """

    name: str
    eye: str
    true: dict[str, float] | None
    shuffled: dict[str, float] | None


@dataclass(frozen=True)
class ScoredSet:
    """A scored set of pairs; ``patients`` maps the eyes of known patients to them."""

    pairs: tuple[ScoredPair, ...]
    seed: int
    patients: Mapping[str, str] = field(default_factory=dict)

    @property
    def whose(self) -> Eyes:
        """The eye of each pair, with the patients."""
        return self._eyes(pair.eye for pair in self.pairs)

    @property
    def eyes(self) -> int:
        """Number of different eyes."""
        return self.whose.different

    def values(self, score: str, *, shuffled: bool = False) -> tuple[Values, Eyes]:
        """Values of one score and the eye of each, over the pairs that have it."""
        found = [(pair.shuffled if shuffled else pair.true, pair.eye) for pair in self.pairs]
        some = [(scores[score], eye) for scores, eye in found if scores is not None]
        return np.array([value for value, _ in some]), self._eyes(eye for _, eye in some)

    def differences(self, score: str) -> tuple[Values, Eyes]:
        """True minus shuffled, pair by pair, and the eye of each."""
        found = [(p.true[score] - p.shuffled[score], p.eye) for p in self.pairs if p.true and p.shuffled]
        return np.array([value for value, _ in found]), self._eyes(eye for _, eye in found)

    def estimate(self, score: str, statistic: Statistic = mean, *, shuffled: bool = False) -> Estimate | None:
        """Estimate of one score; None where no pair has it."""
        values, eyes = self.values(score, shuffled=shuffled)
        return estimate(values, eyes, statistic, seed=self.seed, label=score) if len(values) else None

    def _eyes(self, names: Iterable[str]) -> Eyes:
        return Eyes(tuple(names), self.patients)


def score_set(
    pairs: Iterable[tuple[str, str, PairImages]],
    *,
    seed: int = 0,
    repeats: int = REPEATS,
    patients: Mapping[str, str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> ScoredSet:
    """Score pairs of (name, eye, images), each as it is and against FAs of ``repeats`` other eyes.

    ``patients`` are the known ones of the eyes; the other eye of a patient is another eye.

    Takes about a third of a second per 512x512 pair on one core and keeps about 3 MB of each.
    """
    names: list[tuple[str, str]] = []
    prepared: list[tuple[Features, Features]] = []
    true: list[dict[str, float] | None] = []
    for name, eye, images in pairs:
        names.append((name, eye))
        prepared.append(pair_features(images))
        true.append(compare(*prepared[-1]))
        if on_progress is not None:
            on_progress(len(names))
    partners = [shuffle_by_eye([eye for _, eye in names], derive_seed(seed, "shuffle", k)) for k in range(repeats)]
    scored = []
    for i, (name, eye) in enumerate(names):
        chosen = [others[i] for others in partners if others is not None]
        compared = [compare(prepared[i][0], prepared[j][1]) for j in chosen]
        scored.append(ScoredPair(name, eye, true[i], _mean_scores([scores for scores in compared if scores])))
    return ScoredSet(tuple(scored), seed, patients or {})


def _mean_scores(scores: list[dict[str, float]]) -> dict[str, float] | None:
    if not scores:
        return None
    return {key: float(np.mean([each[key] for each in scores])) for key in SCORES}


def shuffle_by_eye(eyes: Sequence[str], seed: int) -> list[int] | None:
    """For each pair the index of one of another eye; None if there is only one eye.

    A permutation (each FA is used once) wherever the eyes allow it; if one eye has more than half of the pairs, none
    exists, and partners are drawn from the other eyes with replacement.
    """
    if len(set(eyes)) < 2:
        return None
    count = len(eyes)
    rng = random.Random(seed)
    largest = max(list(eyes).count(eye) for eye in set(eyes))
    for _ in range(ATTEMPTS if 2 * largest <= count else 0):
        partner = list(range(count))
        rng.shuffle(partner)
        if _repair(partner, eyes, rng):
            return partner
    return [rng.choice([j for j in range(count) if eyes[j] != eye]) for eye in eyes]


def _repair(partner: list[int], eyes: Sequence[str], rng: random.Random) -> bool:
    """Swap partners until none is of the same eye; False if a pair finds nobody to swap with."""
    order = list(range(len(partner)))
    rng.shuffle(order)
    for i in order:
        if eyes[partner[i]] != eyes[i]:
            continue
        for j in order:
            if eyes[partner[j]] != eyes[i] and eyes[partner[i]] != eyes[j]:
                partner[i], partner[j] = partner[j], partner[i]
                break
        else:
            return False
    return True


def normalised(generated: ScoredSet, real: ScoredSet, score: str) -> tuple[Estimate | None, str | None]:
    """``A = (S_gen - S_gen,shuffled) / (S_real - S_real,shuffled)`` with its interval, or None and the reason.

    Omitted when the denominator is below 3 of its bootstrap standard errors: then real pairs do not stand out either.
    """
    top, top_eyes = generated.differences(score)
    bottom, bottom_eyes = real.differences(score)
    if not len(top):
        return None, "the pairs have no floor: a second eye is needed"
    if not len(bottom) or bottom_eyes.drawn_from < MIN_WHOLE:
        what = "eyes" if bottom_eyes.known_patients is None else "patients (or eyes of unknown ones)"
        return None, f"the reference has {bottom_eyes.drawn_from} {what} with a floor; {MIN_WHOLE} are needed"
    below = draws(bottom, bottom_eyes, mean, seed=real.seed, label=f"real {score}")
    error = float(below.std(ddof=1))
    if bottom.mean() < MIN_STANDARD_ERRORS * error:
        ratio = bottom.mean() / error if error > 0 else 0.0
        return None, f"real pairs stand out from shuffled ones by only {ratio:.1f} standard errors; 3 are needed"
    low: float | None = None
    high: float | None = None
    if top_eyes.drawn_from >= MIN_WHOLE:
        above = draws(top, top_eyes, mean, seed=generated.seed, label=f"generated {score}")
        low, high = interval(above / np.maximum(below, 1e-9))
    value = float(top.mean() / bottom.mean())
    return Estimate(value, low, high, len(top), top_eyes.different, top_eyes.known_patients), None
