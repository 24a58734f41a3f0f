"""Does SD 1.5 fit? The whole path on its full architecture: load, train two steps, checkpoint, resume, sample, save.

The base is written with random weights into a temporary folder (4.3 GB), so nothing is downloaded and nothing is left;
``--base FOLDER`` takes a real one. Seconds and peak memory of every stage, and how many parameters were trained.

    python -m benchmarks.sd15 [--device cuda --precision bf16] [--base FOLDER]

writes benchmarks/results/sd15.json. Goal: at most 20 GB of memory, on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import cffa_core as cffa
from cffa_core.data.phantom import write_phantoms
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import read_state
from cffa_core.models.sd15 import write_sd15
from tests.faults.campaign import machine

RESULTS = Path(__file__).resolve().parent / "results" / "sd15.json"
GOAL_GB = 20.0
LORA_PARAMETERS = 2_390_016


def main() -> None:
    """Run the path once, check what must hold, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, help="an SD 1.5 folder; default: one with random weights, removed after")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2, help="of training, and of the sampler")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory(prefix="cffa-sd15-") as work:
        found = run(options, Path(work))
    result = {
        "question": "does the whole path run on the full SD 1.5 architecture?",
        "machine": machine() | ({"gpu": torch.cuda.get_device_name()} if options.device.startswith("cuda") else {}),
        "torch": torch.__version__,
        "load_before": load,
        "weights": "random" if options.base is None else "given",
        "precision": options.precision,
        "resolution": options.resolution,
        "steps": options.steps,
        **found,
        "goal_peak_gb": GOAL_GB,
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    if found["parameters"] != {"cf": LORA_PARAMETERS, "fa": LORA_PARAMETERS}:
        raise SystemExit(f"expected {LORA_PARAMETERS} trained parameters of each modality")
    if result["peak_memory_gb"] > GOAL_GB:
        raise SystemExit(f"the peak of memory is above {GOAL_GB} GB")


def run(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The path itself; raises whatever goes wrong on it."""
    stages: dict[str, dict[str, float]] = {}
    folder = options.base
    if folder is None:
        with _stage(stages, "write a base with random weights"):
            folder = write_sd15(work / "sd15")
    with _stage(stages, "load"):
        base = cffa.load_base(folder, device=options.device, precision=options.precision)
    write_phantoms(work / "pairs", 3, 1, options.resolution)
    pairs = cffa.load_pairs(work / "pairs", options.resolution)
    out = work / "run"
    seconds: dict[int, float] = {}
    with _stage(stages, f"train {options.steps} steps, validate, checkpoint"):
        _train(base, pairs, out, options.steps, seconds)
    steps = sorted(seconds.values())
    (checkpoint,) = (out / "checkpoints").iterdir()
    with _stage(stages, "verify the checkpoint and resume from it"):
        tensors, state = read_state(checkpoint)
        model = _train(base, pairs, out, options.steps, {})
    if state["step"] != options.steps or not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise RuntimeError("the checkpoint does not hold the steps that were trained")
    with _stage(stages, f"sample 1 pair in {options.steps} steps"):
        (pair,) = model.sample(1, steps=options.steps, batch_size=1, resolution=options.resolution)
    entry = pair.save(work / "new_pairs")
    return {
        "stages": stages,
        "seconds_per_training_step": [round(b - a, 2) for a, b in pairwise(steps)],
        "base_parameters": {
            part: sum(weight.numel() for weight in getattr(base, part).parameters())
            for part in ("unet", "vae", "text_encoder")
        },
        "parameters": model.card["parameters"],
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        "pair": {m: entry[m]["size"] for m in ("cf", "fa")},
        "peak_memory_gb": _peak_gb(),
    }


def _train(base: Base, pairs: Any, out: Path, steps: int, seconds: dict[int, float]) -> Any:
    """Train, or resume; ``seconds`` gets the time at which each training step had ended."""

    def on_progress(stage: str, done: int, total: int) -> None:
        if stage == "training":
            seconds[done] = time.perf_counter()

    return cffa.train(
        base,
        pairs,
        out=out,
        steps=steps,
        validate_every=steps,
        checkpoint_every=steps,
        preview_pairs=0,
        holdout=0.34,
        augment="none",
        gradient_checkpointing=True,
        seed=1,
        on_progress=on_progress,
    )


@contextlib.contextmanager
def _stage(stages: dict[str, dict[str, float]], name: str) -> Iterator[None]:
    """Time a stage; the peak of memory is that of the process up to its end."""
    began = time.perf_counter()
    yield
    stages[name] = {"seconds": round(time.perf_counter() - began, 1), "peak_memory_gb": _peak_gb()}
    print(f"{name}: {stages[name]}", flush=True)


def _peak_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes; on a GPU its memory is added."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return round((resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)) / 1e9, 2)


if __name__ == "__main__":
    main()
