"""The campaign's book-keeping: what passed stays passed, what failed is replayed, nothing is counted twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import __main__ as program
from tests.faults import campaign
from tests.faults.campaign import Facts, Fault, Ledger, Regressions, run_once
from tests.faults.place import Place

WEAK_SEED = 3


@pytest.fixture
def broken() -> set[int]:
    """Seeds at which the fault of these tests is not survived."""
    return {WEAK_SEED}


@pytest.fixture
def fault(broken: set[int]) -> Fault:
    def scenario(seed: int, place: Place) -> Facts:
        assert seed not in broken, f"seed {seed} is weak"
        return {"points": 2, "seconds_lost": float(seed)}

    return Fault("made_up", "a fault of these tests", 8, scenario)


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> Path:
    monkeypatch.setattr(program, "FAULTS", (fault,))
    monkeypatch.setattr(program, "Regressions", lambda: Regressions(tmp_path / "regressions.json"))
    monkeypatch.setattr(program.logging, "disable", lambda level: None)
    monkeypatch.setattr(program.signal, "signal", lambda number, handler: None)
    return tmp_path / "faults.json"


def row(results: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads(results.read_text())["faults"]["made_up"]
    return found


def test_counts_go_on_where_the_last_run_ended(results: Path, broken: set[int]) -> None:
    broken.clear()
    assert program.main(["--results", str(results), "--minutes", "1"]) == 0
    assert (row(results)["passed"], row(results)["runs"]) == (8, 4)
    assert row(results)["worst"] == {"seconds_lost": 4.0}
    assert program.main(["--results", str(results), "--minutes", "1"]) == 0
    assert row(results)["runs"] == 4


def test_a_failing_seed_is_kept_replayed_first_and_counted_as_fixed(results: Path, broken: set[int]) -> None:
    assert program.main(["--results", str(results), "--minutes", "1"]) == 1
    assert (row(results)["passed"], row(results)["failed"]) == (8, 1)
    assert Regressions(results.parent / "regressions.json").seeds("made_up") == [WEAK_SEED]
    broken.clear()
    assert program.main(["--results", str(results), "--minutes", "1"]) == 0
    found = row(results)
    assert (found["failed"], found["failures"], found["passed"]) == (0, [], 10)
    assert found["fixed"] == [{"seed": WEAK_SEED, "error": "AssertionError: seed 3 is weak\nassert 3 not in {3}"}]


def test_no_time_still_replays_what_failed_once(results: Path, broken: set[int]) -> None:
    Regressions(results.parent / "regressions.json").add("made_up", WEAK_SEED)
    assert program.main(["--results", str(results), "--minutes", "0"]) == 1
    assert (row(results)["runs"], row(results)["passed"]) == (1, 0)


def test_what_cannot_run_here_is_skipped_and_not_counted(results: Path, place: Place) -> None:
    def scenario(seed: int, place: Place) -> Facts:
        pytest.skip("no server")

    fault = Fault("made_up", "a fault of these tests", 8, scenario)
    ledger = Ledger(results, [fault])
    ledger.enter(run_once(fault, 1, place), 1)
    assert (row(results)["skipped"], row(results)["runs"], row(results)["last_seed"]) == ("no server", 0, {})


def test_the_results_name_no_machine(results: Path, broken: set[int]) -> None:
    broken.clear()
    program.main(["--results", str(results), "--minutes", "1"])
    (machine,) = json.loads(results.read_text())["machines"]
    assert sorted(machine) == ["cores", "cpu", "memory_gib", "python", "system"]
    assert campaign.platform.node() not in results.read_text()
