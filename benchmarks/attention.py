"""What does it cost to look into the attention? The same pair drawn with and without capture, in turn in one process.

Arms: no capture; cross-attention as a running mean brought to 16x16 (the default of an attention job); the same with
every step kept by itself; cross- and self-attention at two points, at the levels' own sides. All draw the same bits,
which is checked. Time is taken in turn (`timing`); memory is what the store holds, and by how much the process's peak
of resident memory rises over its level before the call (Linux with glibc; the peak is set back between calls).

    python -m benchmarks.attention [--base tiny --resolution 512 --steps 10 --repeats 5]

writes benchmarks/results/attention.json after every arm and round that is over; what it holds for the same setting is
kept and not measured again.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import CLOCKS, circumstances, seconds_of, spread
from cffa_core.attention.processors import capturing
from cffa_core.attention.store import AttentionStore
from cffa_core.jobs.spec import SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.models.base import load_base

RESULTS = Path(__file__).resolve().parent / "results" / "attention.json"
PLAIN = "no capture"
STORES: dict[str, Callable[[], AttentionStore] | None] = {
    PLAIN: None,
    "cross, mean at 16": lambda: AttentionStore(places=("down", "up"), bring_to=16),
    "cross, each step at 16": lambda: AttentionStore(places=("down", "up"), bring_to=16, keep="each"),
    "cross and self, own sides": lambda: AttentionStore(kinds=("cross", "self"), points=((0.5, 0.5), (0.3, 0.45))),
}


def main() -> None:
    """Draw in every arm, in rounds; write the JSON after each round."""
    options = _options()
    torch.set_num_threads(options.threads)
    setting = {name: getattr(options, name) for name in ("base", "resolution", "steps", "threads", "clock")}
    rounds = _known(options.out, setting)
    base = load_base(options.base)
    model = DualUnet(base, TrainSettings(resolution=options.resolution))
    sampler = PairSampler(model, SamplerSpec(steps=options.steps), options.resolution, 1)
    found = {"question": "what does capture cost?", **circumstances("cpu", options.clock), "setting": setting}
    drawn = sampler.latents([7])  # the first call also warms everything up
    while len(rounds) < options.repeats:
        rounds.append(_round(sampler, drawn, len(rounds), options.clock))
        print(f"round {len(rounds)}: {rounds[-1]}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found | {"arms": _arms(rounds), "rounds": rounds}, indent=1) + "\n")
    print(json.dumps(_arms(rounds), indent=1))


def _round(sampler: PairSampler, drawn: torch.Tensor, number: int, clock: str) -> dict[str, dict[str, Any]]:
    """Every arm once, beginning with another one each round."""
    names = list(STORES)
    start = number % len(names)
    result: dict[str, dict[str, Any]] = {}
    for name in names[start:] + names[:start]:
        make = STORES[name]
        store = None if make is None else make()
        gc.collect()
        before = _set_back_peak()
        with nullcontext() if store is None else capturing(sampler.model.unet, store):
            seconds, latents = _draw(sampler, clock)
        result[name] = {
            "seconds": round(seconds, 4),
            "peak_rise_mib": round((_status("VmHWM") - before) / 1024, 1),
            "held_mib": 0.0 if store is None else round(store.numbers * 4 / 2**20, 3),
            "same_bits": torch.equal(latents, drawn),
        }
    return result


def _draw(sampler: PairSampler, clock: str) -> tuple[float, torch.Tensor]:
    """Seconds of one drawing, and its latents."""
    answers: list[torch.Tensor] = []
    seconds = seconds_of(lambda: answers.append(sampler.latents([7])), "cpu", clock)
    return seconds, answers[0]


def _set_back_peak() -> int:
    """Set the process's peak of resident memory back to its level, in KiB, which is returned.

    What the allocator only holds on to is given back first, or it would hide what the next call needs.
    """
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def _arms(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the rounds; times against no capture are taken within a round."""
    result = {}
    for name in STORES:
        arms = [found[name] for found in rounds]
        result[name] = {
            "seconds": spread([arm["seconds"] for arm in arms]),
            "times_no_capture": spread([found[name]["seconds"] / found[PLAIN]["seconds"] for found in rounds], 3),
            "peak_rise_mib": spread([arm["peak_rise_mib"] for arm in arms], 1),
            "held_mib": arms[0]["held_mib"],
            "same_bits": all(arm["same_bits"] for arm in arms),
        }
    return result


def _known(path: Path, setting: dict[str, Any]) -> list[dict[str, dict[str, Any]]]:
    """Rounds that are in ``path`` already, of the same setting."""
    found = json.loads(path.read_text()) if path.is_file() else {}
    return list(found["rounds"]) if found.get("setting") == setting else []


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
