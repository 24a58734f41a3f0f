"""Does the shared initial noise align the two branches? Two trainings, drawn in eight ways, one table.

Trains `dual_unet` twice on procedural pairs (timesteps drawn independently, and shared as in the first implementation),
draws pairs in each arm, and scores them against held-out procedural pairs taken through the base's VAE (METHODS 8).
Every step leaves its result in the work folder and is skipped when it is there, so a run that was cut goes on.

    python benchmarks/noise.py --work runs/noise --pairs 32 --steps 400

prints a Markdown table and writes benchmarks/results/noise.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cffa_core import rng
from cffa_core.data.ingest import open_pairs
from cffa_core.data.phantom import write_phantoms
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec, Scheduler, TrainSettings
from cffa_core.methods.pair_sampler import write_png
from cffa_core.models.base import load_base
from cffa_core.recipes.evaluate import evaluate_alignment, through_vae
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.train import run_training

RESULTS = Path(__file__).resolve().parent / "results" / "noise.json"
SCORES = ("ridge_correlation", "vessel_dice", "cl_dice", "ngf", "mutual_information")

FIRST = {"scheduler": Scheduler.DDPM, "initial_noise": "shared", "step_noise": "independent"}
# name -> (timesteps of the training run, sampler). The first two are v27 as first implemented: ancestral sampling
# whose per-step noise each branch draws for itself.
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "v27 first, t independent": ("independent", FIRST),
    "v27 first, t shared": ("shared", FIRST),
    "DDPM, step noise shared": ("independent", {"scheduler": Scheduler.DDPM, "initial_noise": "shared"}),
    "DDIM, shared": ("independent", {"initial_noise": "shared"}),
    "DDIM, shared, t shared": ("shared", {"initial_noise": "shared"}),
    "DDIM, rotated": ("independent", {"initial_noise": "rotated"}),
    "DDIM, independent": ("independent", {"initial_noise": "independent"}),
    "DDIM, banded": ("independent", {"initial_noise": "banded"}),
}


def main() -> None:
    """Run what is missing, print the table, write the JSON."""
    options = _options()
    work: Path = options.work
    train, held_out = work / "train", work / "held-out"
    _once(train, lambda folder: write_phantoms(folder, options.train_pairs, options.seed, options.resolution))
    _once(held_out, lambda folder: write_phantoms(folder, options.pairs, options.seed + 1, options.resolution))
    ceiling = work / "ceiling"
    _once(ceiling, lambda folder: _through_vae(held_out, options.base, folder))
    for timesteps in sorted({timesteps for timesteps, _ in ARMS.values()}):
        _once(work / f"model-{timesteps}", lambda folder, t=timesteps: _train(options, t, train, folder))
    rows = []
    for number, (name, (timesteps, sampler)) in enumerate(ARMS.items()):
        model = work / f"model-{timesteps}" / "best_checkpoint"
        pairs = work / f"arm-{number}"
        _once(pairs, lambda folder, m=model, s=sampler: _generate(options, m, s, folder))
        pace = json.loads((pairs / "pace.json").read_text(encoding="utf-8"))
        report = evaluate_alignment(pairs / "parts" / "00000", reference=ceiling).to_dict()
        rows.append({"arm": name, **pace, **_digest(report)})
        print(f"{name}: {rows[-1]}", file=sys.stderr)
    result = {
        "question": "does the shared initial noise align the two branches?",
        "base": options.base,
        "resolution": options.resolution,
        "training": {"pairs": options.train_pairs, "steps": options.steps, "learning_rate": options.learning_rate},
        "sampler_steps": options.sampler_steps,
        "device": rng.cpu_model() if not torch.cuda.is_available() else torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "held_out": _digest(evaluate_alignment(held_out).to_dict()),
        "held_out_through_vae": _digest(evaluate_alignment(ceiling).to_dict()),
        "arms": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(_table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/noise"))
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train-pairs", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=32, help="pairs per arm, and held-out pairs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--sampler-steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=2027)
    return parser.parse_args()


def _once(folder: Path, make: Any) -> None:
    """Make a folder whole, or find it whole."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    make(partial)
    partial.rename(folder)


def _through_vae(data: Path, base: str, folder: Path) -> None:
    """The pairs of ``data`` after one round trip through the base's VAE, as a folder of pairs."""
    _, _, opened = open_pairs(data)
    images = ((pair.name, pair.eye, images) for pair, images in opened)
    for name, _, after in through_vae(images, load_base(base)):
        write_png(folder, f"cf/{name}.png", after.cf)
        write_png(folder, f"fa/{name}.png", after.fa)


def _train(options: argparse.Namespace, timesteps: str, data: Path, folder: Path) -> None:
    settings = TrainSettings.model_validate(
        {
            "base": options.base,
            "resolution": options.resolution,
            "steps": options.steps,
            "learning_rate": options.learning_rate,
            "timesteps": timesteps,
            "augment": "none",
            "validate_every": 100,
            "checkpoint_every": 100,
            "preview_pairs": 0,
            "seed": options.seed,
        }
    )
    run_training(settings, data, options.base, folder, FolderContext(folder / "context", _progress))


def _generate(options: argparse.Namespace, model: Path, sampler: dict[str, Any], folder: Path) -> None:
    settings = GenerateSettings(
        count=options.pairs,
        resolution=options.resolution,
        part_size=options.pairs,
        sampler=SamplerSpec(steps=options.sampler_steps, **sampler),
        seed=options.seed,
    )
    drawn = load_sampler(settings, model, options.base)
    began = time.perf_counter()
    generate_part(drawn, settings, 0, folder / "parts" / "00000", FolderContext(folder, _progress))
    seconds = (time.perf_counter() - began) / options.pairs
    (folder / "pace.json").write_text(json.dumps({"seconds_per_pair": round(seconds, 3)}), encoding="utf-8")


def _digest(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the table: true and shuffled score, A with its interval, median and p95 shift."""
    kept: dict[str, Any] = {}
    for score in SCORES:
        found = report["scores"][score]
        kept[score] = {key: found.get(key) for key in ("true", "shuffled", "normalised", "normalised_omitted")}
    return kept | {"residual_shift_px": {k: v["true"] for k, v in report["residual_shift_px"].items()}}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | " + " | ".join(f"A {score}" for score in SCORES) + " | shift px |", "|---" * 7 + "|"]
    for row in rows:
        cells = []
        for score in SCORES:
            value = row[score]["normalised"]
            cells.append("-" if value is None else f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]")
        shift = row["residual_shift_px"]["median"]
        lines.append(f"| {row['arm']} | {' | '.join(cells)} | {'-' if shift is None else round(shift['value'], 1)} |")
    return "\n".join(lines)


def _progress(stage: str, current: int, total: int) -> None:
    print(f"\r{stage} {current}/{total}   ", end="", file=sys.stderr)


if __name__ == "__main__":
    main()
