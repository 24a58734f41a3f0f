"""Fidelity: how far the distribution of generated features is from that of real ones (METHODS 8).

KID first, because it is unbiased for small sets; FID second. Both are refused, with the reason, below the sizes at
which they mean something. Knows features only; which images and which extractor they came from, ``features`` knows.
"""

from __future__ import annotations

import numpy as np

from cffa_core.evaluation.bootstrap import Estimate, Score, Values, Whose, estimate_from_halves, fewest, half_samples
from cffa_core.evaluation.features import FeatureSet, OnMeasure, spaces

KID_MIN = 50  # on both sides
FID_PER_DIMENSION = 2  # samples per feature on both sides: below, the covariances are singular or nearly so
FID_HALVES = 20  # a matrix root each


def fidelity(
    generated: FeatureSet, reference: FeatureSet, *, seed: int = 0, on_measure: OnMeasure | None = None
) -> dict[str, dict[str, Score]]:
    """Scores ``kid`` and ``fid`` for each of ``cf``, ``fa``, ``joint``; lower is better.

    Raises ``InvalidSpec`` if the sets come from two extractors.
    """
    found: dict[str, dict[str, Score]] = {"kid": {}, "fid": {}}
    counted = spaces(generated, reference)
    measures = [(name, measure, space) for space in counted for name, measure in (("kid", kid), ("fid", fid))]
    for done, (name, measure, space) in enumerate(measures, start=1):
        found[name][space] = measure(*counted[space], generated.eyes, reference.eyes, seed=seed, label=space)
        if on_measure is not None:
            on_measure(done, len(measures))
    return found


def kid(generated: Values, reference: Values, eyes: Whose, real_eyes: Whose, *, seed: int, label: str) -> Score:
    """Kernel inception distance (Binkowski et al. 2018): unbiased MMD^2 of features (N, D), (M, D) of one space.

    Polynomial kernel ``(x.y / D + 1)^3``; mean and 95 % range over subsets of half the smaller set, of whole patients
    or eyes. May be slightly below 0 for sets that do not differ.
    """
    count = min(len(generated), len(reference))
    detail: dict[str, float] = {"n_reference": len(reference)}
    if count < KID_MIN:
        reason = f"{len(generated)} pairs against {len(reference)}; {KID_MIN} are needed on both sides"
        return Score(len(generated), refused=reason, detail=detail)
    size = count // 2
    ours = half_samples(eyes, size, seed=seed, label=f"kid {label}")
    real = half_samples(real_eyes, size, seed=seed, label=f"kid reference {label}")
    values = np.array([squared_mmd(generated[a], reference[b]) for a, b in zip(ours, real, strict=True)])
    found = estimate_from_halves(values, len(generated), fewest(eyes, real_eyes))
    return Score(len(generated), found, detail={**detail, "subset_size": size})


def squared_mmd(a: Values, b: Values) -> float:
    """Unbiased MMD^2 of two sets of the same size with the cubic kernel, by torchmetrics."""
    import torch
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(torch.from_numpy(a), torch.from_numpy(b)))


def fid(generated: Values, reference: Values, eyes: Whose, real_eyes: Whose, *, seed: int, label: str) -> Score:
    """Frechet distance of two Gaussians (Heusel et al. 2017) fitted to features (N, D), (M, D) of one space.

    Biased upward for small sets, so it compares only sets of the same size; the interval is the range over random
    halves, moved onto the value.
    """
    dimension = generated.shape[1]
    detail: dict[str, float] = {"n_reference": len(reference), "dimension": dimension}
    needed = FID_PER_DIMENSION * dimension
    if min(len(generated), len(reference)) < needed:
        reason = (
            f"{len(generated)} pairs against {len(reference)}; {needed} are needed on both sides "
            f"({FID_PER_DIMENSION} per feature)"
        )
        return Score(len(generated), refused=reason, detail=detail)
    ours = half_samples(eyes, len(generated) // 2, seed=seed, label=f"fid {label}")[:FID_HALVES]
    real = half_samples(real_eyes, len(reference) // 2, seed=seed, label=f"fid reference {label}")[:FID_HALVES]
    values = np.array([frechet_distance(generated[a], reference[b]) for a, b in zip(ours, real, strict=True)])
    value = frechet_distance(generated, reference)
    fewer = fewest(eyes, real_eyes)
    found: Estimate = estimate_from_halves(values, len(generated), fewer, value, within=(0.0, np.inf))
    return Score(len(generated), found, detail=detail)


def frechet_distance(a: Values, b: Values) -> float:
    """Frechet distance of the Gaussians fitted to features (N, D) and (M, D), by torchmetrics."""
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    identity = torch.nn.Identity()
    identity.num_features = a.shape[1]
    metric = FrechetInceptionDistance(feature=identity)
    metric.update(torch.from_numpy(b), real=True)
    metric.update(torch.from_numpy(a), real=False)
    return float(metric.compute())
