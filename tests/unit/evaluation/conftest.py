"""Procedural pairs for the tests of the evaluation: vessels are known to coincide, and no two eyes are the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from cffa_core.data.contracts import PairImages
from cffa_core.data.ingest import check
from cffa_core.data.phantom import make_phantom
from cffa_core.evaluation.features import FeatureSet
from tests.unit.evaluation.damage import CHANGES, features_of

SIZE = 256
SMALL = 96
HALF = 50


def phantom_pair(seed: int, size: int) -> PairImages:
    """One procedural pair."""
    made = make_phantom(seed, resolution=size)
    return PairImages(made.cf, made.fa, made.valid_cf > 0, made.valid_fa > 0)


@pytest.fixture(scope="session")
def phantoms() -> list[PairImages]:
    """Six procedural pairs of 256 px."""
    return [phantom_pair(seed, SIZE) for seed in range(6)]


@pytest.fixture(scope="session")
def small_phantoms() -> list[PairImages]:
    """100 procedural pairs of 96 px: two halves of the size that KID needs."""
    return [phantom_pair(seed, SMALL) for seed in range(2 * HALF)]


@pytest.fixture(scope="session")
def generated(small_phantoms: list[PairImages]) -> Callable[[str, int], FeatureSet]:
    """Features of the first 50 small phantoms after damage of a kind (`none`, ...) and an amount (0, 1)."""

    @cache
    def run(kind: str, amount: int = 0) -> FeatureSet:
        return features_of(small_phantoms[:HALF], [f"g{i}" for i in range(HALF)], CHANGES[kind][amount])

    return run


@pytest.fixture(scope="session")
def reference(small_phantoms: list[PairImages]) -> FeatureSet:
    """Features of the other 50 small phantoms."""
    return features_of(small_phantoms[HALF:], [f"r{i}" for i in range(HALF)], CHANGES["none"][0])


@pytest.fixture(scope="session")
def real_crops(real_data: Path) -> tuple[list[PairImages], list[str]]:
    """Two crops of each of the 26 real pairs, and the eye of each (only in tests marked `realdata`)."""
    crops, eyes = [], []
    for pair, images in check(real_data / "real_pairs", eye_pattern=r"^(u\d)-|^(m03)[248]$").decoded():
        for left in (0, 192):
            part = (slice(96, 416), slice(left, left + 320))
            whole = (images.cf, images.fa, images.valid_cf, images.valid_fa)
            crops.append(PairImages(*(np.ascontiguousarray(plane[part]) for plane in whole)))
            eyes.append(pair.eye)
    return crops, eyes
