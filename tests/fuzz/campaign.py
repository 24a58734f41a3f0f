"""Schemathesis over the OpenAPI document of a running API: all phases, the stateful one too, and all checks.

``python -m tests.fuzz --minutes 30`` (``make fuzz``) runs long, ``test_fuzz`` a short piece of the same. A server
error, an answer that the document does not describe, or a bad request that is accepted ends it with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.place import IDS, Target, target

CONFIG = Path(__file__).with_name("schemathesis.toml")
ROOT = Path(__file__).resolve().parents[2]


def run(place: Target, *options: str) -> subprocess.CompletedProcess[str]:
    """One run of the fuzzer against ``place``."""
    arguments = [f"{place.url}/openapi.json", *options]
    if place.key:
        arguments += ["-H", f"Authorization: Bearer {place.key}"]
    return subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", *arguments],
        env={**os.environ, IDS: json.dumps(place.ids), "PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def errors_in(logs: Path) -> list[str]:
    """Lines of the server's log that tell of an unexpected error."""
    text = "".join(path.read_text(errors="replace") for path in logs.glob("*.log"))
    return [line for line in text.splitlines() if "Traceback" in line or ("failed" in line and " ERROR " in line)]


def main(given: Sequence[str] | None = None) -> int:
    """Fuzz without keys and with them, half of the time each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--examples", type=int, default=100, help="cases per operation and round")
    parser.add_argument("--seed", type=int, help="the seed that a run printed, to repeat it")
    parser.add_argument("--only", choices=["open", "keyed"])
    options = parser.parse_args(given)
    modes = [options.only] if options.only else ["open", "keyed"]
    seconds = max(1, round(60 * options.minutes / len(modes)))
    failed = 0
    for mode in modes:
        with tempfile.TemporaryDirectory() as folder, target(Path(folder), keyed=mode == "keyed") as place:
            arguments = ["--max-time", str(seconds), "--max-examples", str(options.examples), "--continue-on-failure"]
            if options.seed is not None:
                arguments += ["--seed", str(options.seed)]
            done = run(place, *arguments)
            logged = errors_in(place.logs)
        sys.stdout.write(f"== {mode} ==\n{done.stdout}{done.stderr}\n" + "".join(f"log: {line}\n" for line in logged))
        failed += bool(done.returncode or logged)
    return 1 if failed else 0
