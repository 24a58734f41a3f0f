"""The ledger of a fault campaign: what is to be survived how often, what was, and every seed that failed.

Counts accumulate over runs in one JSON file; failing seeds go into ``regressions.json`` beside this module and stay
there. Nothing here knows a particular fault: those are one module each, listed in ``catalogue``.
"""

from __future__ import annotations

import json
import os
import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from cffa_core.rng import cpu_model

if TYPE_CHECKING:
    from tests.faults.place import Place

ROOT = Path(__file__).resolve().parents[2]
REGRESSIONS = Path(__file__).with_name("regressions.json")
FORMAT = "cffa-faults/1"
ERROR_LENGTH = 400

Facts = dict[str, float | int | str]
Scenario = Callable[[int, "Place"], Facts]


@dataclass(frozen=True)
class Fault:
    """One row of the fault table.

    ``scenario(seed, place)`` makes the fault happen and asserts that it was survived; the same seed makes the same
    choices. It returns facts; ``points`` among them is how much of ``target`` the run covers (1 if absent). ``quick``
    are the seeds that pytest runs, ``seconds`` the longest that one run may take. ``servers`` says that it starts
    some: such tests of one process share them.
    """

    name: str
    what: str
    target: int
    scenario: Scenario
    quick: tuple[int, ...] = (1,)
    seconds: float = 240.0
    servers: bool = False


@dataclass(frozen=True)
class Run:
    """One scenario that was run. ``error`` is None if it passed; ``skipped`` says why it could not be run."""

    fault: str
    seed: int
    seconds: float
    facts: Facts
    error: str | None = None
    trace: str = ""
    skipped: str | None = None

    @property
    def points(self) -> int:
        """How much of the target this run covers."""
        return int(self.facts.get("points", 1))


def run_once(fault: Fault, seed: int, place: Place) -> Run:
    """Run a scenario; whatever it raises is part of the result, except the wish to stop."""
    began = time.monotonic()
    try:
        facts = fault.scenario(seed, place)
    except pytest.skip.Exception as missing:
        return Run(fault.name, seed, time.monotonic() - began, {}, skipped=str(missing))
    except Exception as error:  # noqa: BLE001 - a campaign goes on; the failure is written down with its seed
        # Paths in the results are those of the project, not of the machine.
        text = f"{type(error).__name__}: {error}".replace(f"{ROOT}/", "")[:ERROR_LENGTH]
        return Run(fault.name, seed, time.monotonic() - began, {}, error=text, trace=traceback.format_exc())
    return Run(fault.name, seed, time.monotonic() - began, facts)


class Regressions:
    """Seeds that failed once, by fault; they are replayed first by every campaign and by pytest."""

    def __init__(self, path: Path = REGRESSIONS) -> None:
        self._path = path

    def seeds(self, fault: str) -> list[int]:
        """Seeds of one fault that failed once, oldest first."""
        return list(self._read().get(fault, []))

    def add(self, fault: str, seed: int) -> None:
        """Remember a seed."""
        known = self._read()
        if seed not in known.setdefault(fault, []):
            known[fault].append(seed)
            write_json(self._path, dict(sorted(known.items())))

    def _read(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = json.loads(self._path.read_text()) if self._path.exists() else {}
        return found


class Ledger:
    """The results file: per fault ``target``, ``passed`` (points), ``runs``, ``failed`` and ``seconds``.

    ``failures`` are seeds that failed and have not passed since, ``fixed`` those that have. ``worst`` holds the
    largest value of every numeric fact.
    """

    def __init__(self, path: Path, faults: list[Fault]) -> None:
        self._path = path
        raw = json.loads(path.read_text()) if path.exists() else {}
        if raw and raw.get("format") != FORMAT:
            raise ValueError(f"{path} is not a results file of this campaign ({FORMAT})")
        self.faults: dict[str, dict[str, Any]] = raw.get("faults", {})
        self.machines: list[dict[str, Any]] = raw.get("machines", [])
        for fault in faults:
            row = self.faults.setdefault(fault.name, _empty_row())
            row |= {"what": fault.what, "target": fault.target}

    def reached(self, fault: Fault) -> bool:
        """Whether the target is reached."""
        return bool(self.faults[fault.name]["passed"] >= fault.target)

    def tried(self, fault: Fault) -> float:
        """How much of the target was tried, with or without success."""
        row = self.faults[fault.name]
        return float(row["passed"] + row["failed"] + len(row["fixed"])) / fault.target

    def next_seed(self, fault: Fault, first: int) -> int:
        """The seed after the largest that was ever run from ``first`` on."""
        last: dict[str, int] = self.faults[fault.name]["last_seed"]
        return last.get(str(first), first - 1) + 1

    def enter(self, run: Run, first: int | None) -> None:
        """Write a run down; ``first`` is the seed its series began with, None for a replay."""
        row = self.faults[run.fault]
        if run.skipped is not None:
            row["skipped"] = run.skipped
            return self.save()
        row.pop("skipped", None)
        if first is not None:
            row["last_seed"][str(first)] = run.seed
        row["runs"] += 1
        row["seconds"] = round(row["seconds"] + run.seconds, 1)
        known = {failure["seed"]: failure for failure in row["failures"]}
        if run.error is not None:
            known[run.seed] = {"seed": run.seed, "error": run.error}
        else:
            row["passed"] += run.points
            if run.seed in known:
                row["fixed"].append(known.pop(run.seed))
            for name, value in run.facts.items():
                if isinstance(value, int | float) and name != "points":
                    row["worst"][name] = round(max(value, row["worst"].get(name, value)), 3)
        row["failures"] = list(known.values())
        row["failed"] = len(known)
        return self.save()

    def save(self) -> None:
        """Write the file whole or not at all."""
        here = machine()
        if here not in self.machines:
            self.machines.append(here)
        write_json(self._path, {"format": FORMAT, "machines": self.machines, "faults": self.faults})


def _empty_row() -> dict[str, Any]:
    counts = {"target": 0, "passed": 0, "runs": 0, "failed": 0, "seconds": 0.0}
    return {"what": "", **counts, "failures": [], "fixed": [], "worst": {}, "last_seed": {}}


def machine() -> dict[str, Any]:
    """What kind of machine this is; never which one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
