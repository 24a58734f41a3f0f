"""``python -m tests.faults``: run fault scenarios until a time is over or every target is reached; go on next time.

Seeds that failed once are replayed first. Then the fault that is furthest from its target is next, with the seed after
its last one, so that several short runs cover what one long run would. A fault that fails three times in a row is left
alone for the rest of the run. Ends with 1 if a seed failed and did not pass since.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from tests.faults.campaign import Fault, Ledger, Regressions, Run, run_once
from tests.faults.catalogue import FAULTS
from tests.faults.place import Place

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "faults.json"
FIRST_SEED = 1
GIVE_UP = 3


class ScenarioHangs(Exception):
    """A scenario took longer than it may."""


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; returns the exit code."""
    options = _options(arguments)
    faulthandler.enable()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers and workers are ended, too
    logging.disable(logging.CRITICAL)  # workers in threads of this process; those in processes write to a log file
    chosen = [fault for fault in FAULTS if not options.only or fault.name in options.only]
    ledger, regressions = Ledger(options.results, chosen), Regressions()
    end = time.monotonic() + 60.0 * options.minutes
    failed: dict[str, int] = {}
    with (
        tempfile.TemporaryDirectory(prefix="cffa-faults-", ignore_cleanup_errors=True) as folder,
        contextlib.closing(Place(Path(folder))) as place,
    ):
        for fault in chosen:
            for seed in regressions.seeds(fault.name):
                ledger.enter(_say(_guarded(fault, seed, place)), None)
        while time.monotonic() < end:
            left = [fault for fault in chosen if not ledger.reached(fault)]
            if not left:
                break
            fault = min(left, key=ledger.tried)
            run = _say(_guarded(fault, ledger.next_seed(fault, options.seed), place))
            ledger.enter(run, options.seed)
            failed[fault.name] = failed.get(fault.name, 0) + 1 if run.error is not None else 0
            if run.error is not None:
                regressions.add(fault.name, run.seed)
            if run.skipped is not None or failed[fault.name] == GIVE_UP:
                chosen.remove(fault)
    sys.stdout.write(f"{table(ledger)}\n")
    return 1 if any(row["failed"] for row in ledger.faults.values()) else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    names = [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of: {', '.join(names)}")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so long (60)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file in which the counts accumulate")
    parser.add_argument("--seed", type=int, default=FIRST_SEED, help="first seed of a series of its own (1)")
    return parser.parse_args(arguments)


def _guarded(fault: Fault, seed: int, place: Place) -> Run:
    """Run a scenario that is ended, as failed, when it takes too long."""
    _tell(f"{fault.name} seed {seed} ...")
    with _at_most(fault.seconds):
        return run_once(fault, seed, place)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        faulthandler.dump_traceback()
        raise ScenarioHangs(f"not over after {seconds:g} s")

    signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _say(run: Run) -> Run:
    if run.skipped is not None:
        _tell(f" skipped: {run.skipped}\n")
    elif run.error is not None:
        _tell(f" FAILED after {run.seconds:.1f} s\n{run.trace}\n")
    else:
        _tell(f" ok in {run.seconds:.1f} s {run.facts}\n")
    return run


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def table(ledger: Ledger) -> str:
    """The fault table as Markdown."""
    lines = ["| fault | passed / target | runs | failed | minutes |", "|---|---|---|---|---|"]
    for row in ledger.faults.values():
        note = f" (skipped: {row['skipped']})" if "skipped" in row else ""
        counts = f"{row['passed']} / {row['target']} | {row['runs']} | {row['failed']} | {row['seconds'] / 60:.1f}"
        lines.append(f"| {row['what']}{note} | {counts} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
