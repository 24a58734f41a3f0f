"""Procedural pairs for the tests of the alignment scores: vessels are known to coincide."""

from __future__ import annotations

import pytest

from cffa_core.data.contracts import PairImages
from cffa_core.data.phantom import make_phantom

SIZE = 256


@pytest.fixture(scope="session")
def phantoms() -> list[PairImages]:
    """Six procedural pairs of 256 px."""
    made = [make_phantom(seed, resolution=SIZE) for seed in range(6)]
    return [PairImages(p.cf, p.fa, p.valid_cf > 0, p.valid_fa > 0) for p in made]
