"""Which method aligns best? All pair methods on the same pairs with the same budget, in one table.

Trains every method on the same procedural pairs (and, with ``--real FOLDER``, on few real ones, split by eye) for the
same number of steps from the same base, draws pairs from each and measures them against held-out pairs: alignment,
fidelity, diversity, memorisation, and what a step and a pair cost (METHODS 3, 8). Every step leaves its result in the
work folder and is skipped when it is there, so a run that was cut goes on.

    python -m benchmarks.methods --work runs/methods

writes benchmarks/results/methods.json (``--results``), a picture of every arm's first pairs beside it, and prints the
table. On a GPU: ``--device cuda --precision bf16 --steps 15000 --sampler-steps 50 --pairs 256``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from cffa_core import rng
from cffa_core.data.contracts import CheckedPair, PairImages
from cffa_core.data.ingest import open_pairs
from cffa_core.data.phantom import write_phantoms
from cffa_core.data.sheet import SheetRow, contact_sheet
from cffa_core.errors import CffaError
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import GenerateSettings, SamplerSpec, Scheduler, TrainSettings
from cffa_core.methods.method import read_card
from cffa_core.methods.pair_sampler import write_png
from cffa_core.recipes.evaluate_pairs import evaluate_pairs
from cffa_core.recipes.generate import generate_part, load_sampler
from cffa_core.recipes.structures import structures_for
from cffa_core.recipes.train import run_training

RESULTS = Path(__file__).resolve().parent / "results" / "methods.json"
SCORES = {
    "ridge_correlation": "ridge",
    "vessel_dice": "Dice",
    "cl_dice": "clDice",
    "ngf": "NGF",
    "mutual_information": "MI",
}
SHOWN = 3
HOLDOUT = 0.3

# What is trained: settings beyond the common ones.
MODELS: dict[str, dict[str, Any]] = {
    "dual_unet": {},
    "dual_unet, t shared": {"timesteps": "shared"},
    "shared_attention": {"method": "shared_attention"},
    "side_by_side": {"method": "side_by_side"},
    "controlnet": {"method": "controlnet", "controlnet": {"vessels": "masks"}},
}
SHARED: dict[str, Any] = {"initial_noise": "shared"}
SEPARATE_STEPS: dict[str, Any] = {**SHARED, "scheduler": Scheduler.DDPM, "step_noise": "independent"}


@dataclass(frozen=True)
class Arm:
    """One row of the table: a trained model and how it is drawn from."""

    name: str
    model: str
    sampler: dict[str, Any] = field(default_factory=dict)


ARMS = (
    Arm("v27 as first implemented (t shared, DDPM, step noise apart)", "dual_unet, t shared", SEPARATE_STEPS),
    Arm("v27 as documented (t independent, DDPM, step noise apart)", "dual_unet", SEPARATE_STEPS),
    Arm("dual_unet, banded noise", "dual_unet", {"initial_noise": "banded"}),
    Arm("dual_unet, shared noise", "dual_unet", SHARED),
    Arm("dual_unet, shared noise, t shared", "dual_unet, t shared", SHARED),
    Arm("dual_unet, rotated noise", "dual_unet", {"initial_noise": "rotated"}),
    Arm("dual_unet, independent noise (floor)", "dual_unet", {"initial_noise": "independent"}),
    Arm("shared_attention, shared noise", "shared_attention", SHARED),
    Arm("shared_attention, banded noise", "shared_attention", {"initial_noise": "banded"}),
    Arm("side_by_side", "side_by_side"),
    Arm("controlnet, shared noise (structures of the held-out pairs)", "controlnet", SHARED),
    Arm("controlnet, banded noise (structures of the held-out pairs)", "controlnet", {"initial_noise": "banded"}),
)


def main() -> None:
    """Run what is missing, print the tables, write the JSON."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "question": "which method aligns best?",
        "base": options.base,
        "resolution": options.resolution,
        "training": {"learning_rate": options.learning_rate, "precision": options.precision},
        "sampler_steps": options.sampler_steps,
        "device": torch.cuda.get_device_name() if options.device != "cpu" else rng.cpu_model(),
        "threads": torch.get_num_threads(),
        "clock": "CPU time of the process" if options.threads == 1 else "wall clock",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "sets": {},
    }
    sets = {"procedural": _procedural} | ({"real": _real} if options.real else {})
    for name, prepare in sets.items():
        if options.only and name not in options.only:
            continue
        work = options.work / name
        train, held_out = prepare(options, work)
        rows = [_row(options, name, arm, work, train, held_out) for arm in ARMS if not _left_out(options, arm)]
        budget = {"train": _count(train), "held_out": _count(held_out), "steps": _steps(options, name)}
        result["sets"][name] = {**budget, "pairs": _pairs(options, name), "arms": rows}
        _write(options.results, result)
        if name == "procedural":  # real eyes, and what was learned from them, stay where they are
            _picture(options.results.with_suffix(".png"), work, rows)
        print(f"\n{name}: {_count(train)} training pairs, {_count(held_out)} held out\n\n{_table(rows)}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--real", type=Path, help="a folder of real pairs for the few-shot part")
    parser.add_argument("--only", nargs="+", choices=["procedural", "real"])
    parser.add_argument("--arms", nargs="+", metavar="WORD", help="only arms whose name contains one of these words")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--train-pairs", type=int, default=300)
    parser.add_argument(
        "--pairs", type=int, default=64, help="pairs per arm, and held-out procedural pairs; KID needs 50"
    )
    parser.add_argument("--real-steps", type=int, default=300, help="steps per model of the real part: few pairs")
    parser.add_argument("--real-pairs", type=int, default=32, help="pairs per arm of the real part: alignment only")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--sampler-steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=2027)
    return parser.parse_args()


def _steps(options: argparse.Namespace, name: str) -> int:
    return int(options.real_steps if name == "real" else options.steps)


def _pairs(options: argparse.Namespace, name: str) -> int:
    return int(options.real_pairs if name == "real" else options.pairs)


def _left_out(options: argparse.Namespace, arm: Arm) -> bool:
    return bool(options.arms) and not any(word in arm.name for word in options.arms)


# --- pairs --------------------------------------------------------------------------------------------------------


def _procedural(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    train, held_out = work / "train", work / "held-out"
    _once(train, lambda folder: write_phantoms(folder, options.train_pairs, options.seed, options.resolution))
    _once(held_out, lambda folder: write_phantoms(folder, options.pairs, options.seed + 1, options.resolution))
    return train, held_out


def _real(options: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """Real pairs split by eye; both halves get vessel maps by Frangi, since there are no masks."""
    from random import Random

    _, listed, _ = open_pairs(options.real)
    eyes = sorted({pair.eye for pair in listed})
    Random(rng.derive_seed(options.seed, "real eyes")).shuffle(eyes)
    out = set(eyes[: max(2, round(HOLDOUT * len(eyes)))])
    train, held_out = work / "train", work / "held-out"
    _once(train, lambda folder: _copy(options.real, folder, lambda pair: pair.eye not in out))
    _once(held_out, lambda folder: _copy(options.real, folder, lambda pair: pair.eye in out))
    return train, held_out


def _copy(source: Path, folder: Path, wanted: Callable[[CheckedPair], bool]) -> None:
    _, _, opened = open_pairs(source)
    lines = ["name,eye"]
    for pair, images in _wanted(opened, wanted):
        write_png(folder, f"cf/{pair.name}.png", images.cf)
        write_png(folder, f"fa/{pair.name}.png", images.fa)
        lines.append(f"{pair.name},{pair.eye}")
    (folder / "eyes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _wanted(
    opened: Iterator[tuple[CheckedPair, PairImages]], wanted: Callable[[CheckedPair], bool]
) -> Iterator[tuple[CheckedPair, PairImages]]:
    return ((pair, images) for pair, images in opened if wanted(pair))


def _count(folder: Path) -> int:
    return len(list((folder / "cf").iterdir()))


# --- one row --------------------------------------------------------------------------------------------------------


def _row(options: argparse.Namespace, name: str, arm: Arm, work: Path, train: Path, held_out: Path) -> dict[str, Any]:
    key = _key(arm.name)
    model = work / f"model-{_key(arm.model)}"
    pairs, report = work / f"pairs-{key}", work / f"report-{key}"
    _once(model, lambda folder: _train(options, name, arm.model, train, folder))
    _once(pairs, lambda folder: _generate(options, name, arm, model / "best_checkpoint", held_out, folder))
    _once(report, lambda folder: _evaluate(options, pairs / "parts" / "00000", held_out, train, folder))
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    card = read_card(model / "best_checkpoint")
    return {
        "arm": arm.name,
        "method": card["method"],
        "parameters": sum(card["parameters"].values()),
        "seconds_per_step": json.loads((model / "pace.json").read_text())["seconds"],
        "seconds_per_pair": json.loads((pairs / "pace.json").read_text())["seconds"],
        "alignment": {score: found["alignment"]["scores"][score] for score in SCORES},
        "residual_shift_px": found["alignment"]["residual_shift_px"],
        "fidelity": found["fidelity"],
        "diversity": found["diversity"],
        "memorisation": {key: found["memorisation"][key] for key in ("flagged_share", "auth_pct")},
    }


def _train(options: argparse.Namespace, name: str, model: str, data: Path, folder: Path) -> None:
    chosen, steps = MODELS[model], _steps(options, name)
    if name == "real" and "controlnet" in chosen:
        chosen = {**chosen, "controlnet": {"vessels": "frangi"}}
    settings = TrainSettings.model_validate(
        {
            "base": options.base,
            "resolution": options.resolution,
            "steps": steps,
            "batch_size": options.batch_size,
            "learning_rate": options.learning_rate,
            "precision": options.precision,
            "augment": "none" if name == "procedural" else "dihedral",
            "validate_every": max(1, steps // 4),
            "checkpoint_every": max(1, steps // 6),
            "preview_pairs": 0,
            "seed": options.seed,
            **chosen,
        }
    )
    ticks: list[float] = []

    def on_progress(stage: str, current: int, total: int) -> None:
        if stage == "training":
            ticks.append(_clock(options))
        _progress(f"{name} {model}: {stage}", current, total)

    run_training(
        settings, data, options.base, folder, FolderContext(folder / "context", on_progress), device=options.device
    )
    # The first epoch encodes; a median over the second half of the run sees steps alone.
    gaps = [after - before for before, after in pairwise(ticks)]
    seconds = statistics.median(gaps[len(gaps) // 2 :]) if gaps else None
    (folder / "pace.json").write_text(json.dumps({"seconds": seconds, "load": os.getloadavg()[0]}), encoding="utf-8")


def _generate(options: argparse.Namespace, name: str, arm: Arm, model: Path, held_out: Path, folder: Path) -> None:
    conditional = arm.model == "controlnet"
    count = _pairs(options, name)
    settings = GenerateSettings(
        count=count,
        resolution=options.resolution,
        part_size=count,
        precision=options.precision,
        sampler=SamplerSpec(steps=options.sampler_steps, **arm.sampler),
        structures="dataset" if conditional else None,
        seed=options.seed,
    )
    sampler = load_sampler(settings, model, options.base, options.device)
    structures = structures_for(settings, sampler.model, held_out if conditional else None)
    context = FolderContext(folder, lambda stage, current, total: _progress(f"{arm.name}: {stage}", current, total))
    began = _clock(options)
    generate_part(sampler, settings, 0, folder / "parts" / "00000", context, structures)
    seconds = (_clock(options) - began) / count
    (folder / "pace.json").write_text(json.dumps({"seconds": seconds, "load": os.getloadavg()[0]}), encoding="utf-8")


def _evaluate(options: argparse.Namespace, pairs: Path, held_out: Path, train: Path, folder: Path) -> None:
    evaluate_pairs(
        pairs, reference=held_out, train=train, base=options.base, out=folder, seed=options.seed, device=options.device
    )


def _clock(options: argparse.Namespace) -> float:
    """Seconds. One thread is timed by the CPU it had, which other work on the machine does not change."""
    return time.process_time() if options.threads == 1 else time.perf_counter()


def _once(folder: Path, make: Callable[[Path], object]) -> None:
    """Make a folder whole, or find it whole."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        make(partial)
    except CffaError as error:
        raise SystemExit(f"{folder.name}: {error}") from error
    partial.rename(folder)


# --- what is shown ----------------------------------------------------------------------------------------------------


def _table(rows: list[dict[str, Any]]) -> str:
    heads = ["arm", *(f"A {title}" for title in SCORES.values()), "shift px"]
    heads += ["KID cf", "KID fa", "coverage", "AuthPct", "s/step", "s/pair", "parameters"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [row["arm"]]
        cells += [_shown(row["alignment"][score]["normalised"], 2) for score in SCORES]
        cells.append(_shown(row["residual_shift_px"]["median"]["true"], 1))
        cells += [_shown(row["fidelity"]["kid"][m], 3) for m in ("cf", "fa")]
        cells += [_shown(row["diversity"]["coverage"]["joint"], 2), _shown(row["memorisation"]["auth_pct"], 0)]
        step = row["seconds_per_step"]
        cells += ["-" if step is None else f"{step:.2f}", f"{row['seconds_per_pair']:.2f}", f"{row['parameters']:,}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(found: dict[str, Any] | None, digits: int) -> str:
    if found is None or found.get("value") is None:
        return "-"
    low, high = found.get("low"), found.get("high")
    interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{found['value']:.{digits}f}{interval}"


def _picture(path: Path, work: Path, rows: list[dict[str, Any]]) -> None:
    """The first pairs of every arm, as they came."""
    import numpy as np

    shown = []
    for row in rows:
        part = work / f"pairs-{_key(row['arm'])}" / "parts" / "00000"
        for place, image in enumerate(sorted((part / "cf").iterdir())[:SHOWN]):
            cf, fa = np.asarray(Image.open(image)), np.asarray(Image.open(part / "fa" / image.name))
            shown.append(SheetRow(cf, fa, (row["arm"], f"pair {place}")))
    contact_sheet(shown, path, title="First pairs of every arm", cell=192)


def _key(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.partition(" (")[0]).strip("-")


def _write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _progress(stage: str, current: int, total: int) -> None:
    print(f"\r{stage} {current}/{total}   ", end="", file=sys.stderr)


if __name__ == "__main__":
    main()
