"""A few seeds of every fault, and all seeds that failed once; ``python -m tests.faults`` runs the large numbers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.campaign import Fault, Regressions
from tests.faults.catalogue import FAULTS
from tests.faults.place import Place


def cases() -> list[Any]:
    """One case per fault and seed; those with servers share a test process."""
    found = []
    for fault in FAULTS:
        marks = [pytest.mark.timeout(fault.seconds)]
        if fault.servers:
            marks.append(pytest.mark.xdist_group("fault-servers"))
        seeds = [*Regressions().seeds(fault.name), *fault.quick]
        found += [pytest.param(fault, seed, marks=marks, id=f"{fault.name}-{seed}") for seed in dict.fromkeys(seeds)]
    return found


@pytest.mark.parametrize(("fault", "seed"), cases())
def test_the_fault_is_survived(fault: Fault, seed: int, place: Place) -> None:
    facts = fault.scenario(seed, place)
    assert int(facts.get("points", 1)) >= 0
