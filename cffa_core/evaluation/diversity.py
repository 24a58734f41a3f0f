"""Diversity: do generated pairs cover what real ones show, and how many different ones are there? (METHODS 8)

Density and coverage compare with real pairs; the Vendi score counts. Knows features only.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np

from cffa_core.evaluation.bootstrap import Score, Values, Whose, estimate_from_halves, fewest, half_samples
from cffa_core.evaluation.features import FeatureSet, OnMeasure, spaces

NEAREST = 5
MIN_PAIRS = 20  # on both sides
MEASURES = ("density", "coverage", "vendi", "vendi_reference")


def diversity(
    generated: FeatureSet, reference: FeatureSet, *, seed: int = 0, on_measure: OnMeasure | None = None
) -> dict[str, dict[str, Score]]:
    """Scores ``density``, ``coverage``, ``vendi`` and ``vendi_reference`` for each of ``cf``, ``fa``, ``joint``.

    Raises ``InvalidSpec`` if the sets come from two extractors.
    """
    found: dict[str, dict[str, Score]] = {measure: {} for measure in MEASURES}
    eyes, real_eyes = generated.eyes, reference.eyes
    counted = spaces(generated, reference)
    for done, (space, (a, b)) in enumerate(counted.items(), start=1):
        measured = [*density_coverage(a, b, eyes, real_eyes, seed=seed, label=space)]
        measured += [*vendi_scores(a, b, eyes, real_eyes, seed=seed, label=space)]
        for measure, score in zip(MEASURES, measured, strict=True):
            found[measure][space] = score
        if on_measure is not None:
            on_measure(done, len(counted))
    return found


def density_coverage(
    generated: Values, reference: Values, eyes: Whose, real_eyes: Whose, *, seed: int, label: str
) -> tuple[Score, Score]:
    """Density and coverage (Naeem et al. 2020, k = 5) of features (N, D) around real ones (M, D).

    A real pair's ball reaches to its 5th nearest real neighbour. Density: how many balls a generated pair lies in, in
    units of 5 (about 1 for the same distribution). Coverage: share of the balls with a generated pair inside (0.97
    for the same distribution at equal sizes). Intervals: range over halves of both sets, moved onto the value.
    """
    detail: dict[str, float] = {"n_reference": len(reference), "nearest": NEAREST}
    refused = _too_few(generated, reference)
    if refused is not None:
        nothing = Score(len(generated), refused=refused, detail=detail)
        return nothing, nothing
    whole = prdc(generated, reference)
    between, among = _distances(reference, generated), _distances(reference, reference)
    ours = half_samples(eyes, len(generated) // 2, seed=seed, label=f"prdc {label}")
    real = half_samples(real_eyes, len(reference) // 2, seed=seed, label=f"prdc reference {label}")
    halves = [_of_balls(between[np.ix_(r, g)], among[np.ix_(r, r)]) for r, g in zip(real, ours, strict=True)]
    fewer = fewest(eyes, real_eyes)
    density, coverage = (
        Score(
            len(generated),
            estimate_from_halves(
                np.array([half[side] for half in halves]), len(generated), fewer, whole[side], within=(0.0, most)
            ),
            detail=detail,
        )
        for side, most in enumerate((np.inf, 1.0))
    )
    return density, coverage


def prdc(generated: Values, reference: Values) -> tuple[float, float]:
    """Density and coverage by the authors' library, which prints on the way."""
    from prdc import compute_prdc  # type: ignore[import-untyped]

    with contextlib.redirect_stdout(io.StringIO()):
        found = compute_prdc(reference, generated, NEAREST)
    return float(found["density"]), float(found["coverage"])


def _of_balls(between: Values, among: Values) -> tuple[float, float]:
    """Density and coverage from distances: real to generated (M, N), real to real (M, M)."""
    radius = np.partition(among, NEAREST, axis=1)[:, NEAREST]
    density = float((between < radius[:, None]).sum(axis=0).mean()) / NEAREST
    return density, float((between.min(axis=1) < radius).mean())


def _distances(a: Values, b: Values) -> Values:
    from scipy.spatial.distance import cdist

    return np.asarray(cdist(a, b))


def vendi_scores(
    generated: Values, reference: Values, eyes: Whose, real_eyes: Whose, *, seed: int, label: str
) -> tuple[Score, Score]:
    """Vendi scores of generated and of real pairs: mean and range over random subsets of ONE size.

    The score grows with the number of pairs, so both are counted among as many: half of the smaller set.
    """
    size = min(len(generated), len(reference)) // 2
    found = []
    refused = _too_few(generated, reference)
    for values, whose, name in ((generated, eyes, "generated"), (reference, real_eyes, "reference")):
        if refused is not None:
            found.append(Score(len(values), refused=refused))
            continue
        similar = _cosines(values)
        halves = half_samples(whose, size, seed=seed, label=f"vendi {name} {label}")
        counted = np.array([vendi(similar[np.ix_(half, half)]) for half in halves])
        estimate = estimate_from_halves(counted, len(values), whose)
        found.append(Score(len(values), estimate, detail={"subset_size": size}))
    return found[0], found[1]


def vendi(similar: Values) -> float:
    """Vendi score (Friedman and Dieng 2023): ``exp(-sum l log l)`` over the eigenvalues of ``K / n``.

    ``similar`` is K (n, n), positive semi-definite with ones on its diagonal; the result lies in [1, n]: the effective
    number of different items.
    """
    values = np.linalg.eigvalsh(similar / len(similar))
    some = values[values > 1e-12]
    return float(np.exp(-(some * np.log(some)).sum()))


def _cosines(values: Values) -> Values:
    """Cosine similarity of features that are centred on the reference."""
    size = np.linalg.norm(values, axis=1, keepdims=True)
    unit = values / np.maximum(size, 1e-12)
    similar = unit @ unit.T
    np.fill_diagonal(similar, 1.0)
    return np.asarray(similar)


def _too_few(generated: Values, reference: Values) -> str | None:
    if min(len(generated), len(reference)) >= MIN_PAIRS:
        return None
    return f"{len(generated)} pairs against {len(reference)}; {MIN_PAIRS} are needed on both sides"
