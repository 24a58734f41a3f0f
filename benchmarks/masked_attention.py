"""Do placeholder tokens look where their masks are, and do they draw what they are named after? (METHODS 6)

Trains `dual_unet` with tokens on procedural pairs from `tiny`, then measures on eyes it has not seen: the IoU of every
token's attention with its mask, before, after phase 1 and after phase 2, with masks of OTHER eyes as the level of
chance; and on drawn pairs, how often a structure is there whose token was in the prompt, and whose was left out (twins
from the same noise). Everything is kept below --work: a run that was cut goes on.

    python benchmarks/masked_attention.py --work runs/masked

prints the tables and writes benchmarks/results/masked_attention.json and, with --sheet, pictures of twins.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.stats import binomtest

from cffa_core import rng
from cffa_core.data.pairs import PairSet, load_pairs, turn
from cffa_core.data.phantom import make_phantom, write_phantoms
from cffa_core.diffusion.latents import LatentCache, Variant
from cffa_core.diffusion.masked_losses import overlap
from cffa_core.errors import Cancelled, CffaError
from cffa_core.evaluation import bootstrap
from cffa_core.evaluation.findings import MODALITIES, FindingsClassifier
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import SamplerSpec, TokenSpec, TokensSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import PairSampler, write_png
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.train import train_pairs

RESULTS = Path(__file__).resolve().parent / "results" / "masked_attention.json"
TOKENS = ("disc", "macula", "lesion", "vessel")
# Of the four words `tiny` knows the lesions' alone (docs/tiny-base.md), by other names than the token's.
INITIAL = {"lesion": "haemorrhages"}
TIMESTEPS = (200, 400, 600)
# Those that are large enough to be judged at 256 px.
LARGE_FINDINGS = ("haemorrhage", "exudate")
ARMS: dict[str, tuple[str, ...]] = {
    "all": TOKENS,
    "without_disc": ("macula", "lesion", "vessel"),
    "without_lesion": ("disc", "macula", "vessel"),
}
Image8 = NDArray[np.uint8]


def main() -> None:
    """Do what is missing, print the tables, write the JSON."""
    options = _options()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    base = load_base("tiny")
    data = {name: _eyes(options, name, count, seed) for name, count, seed in (("train", options.pairs, 101),)}
    data["held_out"] = _eyes(options, "held_out", options.eyes, 202)
    settings = _settings(options)
    folder, minutes = _train(options, settings, base, data["train"])
    models: dict[str, Path | None] = {"before": None, "phase 1": options.work / "phase1", "phase 2": folder}
    attention = {
        name: _kept(options, f"attention_{name.replace(' ', '')}", partial(_overlaps, base, settings, path, data))
        for name, path in models.items()
    }
    result: dict[str, Any] = {
        "base": base.name,
        "resolution": options.resolution,
        "pairs": options.pairs,
        "settings": settings.model_dump(mode="json", include={"tokens", "steps", "learning_rate", "lora", "augment"}),
        "stopped_at_step": options.stop or settings.steps,
        "training_minutes": minutes,
        "timesteps": TIMESTEPS,
        "guidance": options.guidance,
        "attention": _table(options, attention),
        "device": rng.cpu_model(),
        "torch": torch.__version__,
    }
    drawn = _draw(options, base, folder)
    result["disc"] = _discs(options, drawn)
    result["lesion"] = _lesions(options, drawn)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if options.sheet:
        _sheet(drawn, options.sheet)
    _print(result)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is kept")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=60, help="procedural pairs to train on")
    parser.add_argument("--eyes", type=int, default=32, help="held-out procedural eyes whose attention is measured")
    parser.add_argument("--drawn", type=int, default=32, help="pairs drawn with each set of tokens")
    parser.add_argument("--guidance", type=float, default=1.0, help="of the pairs drawn")
    parser.add_argument("--phase1", type=int, default=300)
    parser.add_argument("--phase2", type=int, default=900)
    parser.add_argument("--stop", type=int, help="stop the training at this checkpoint and measure its model")
    parser.add_argument("--sheet", type=Path, help="PNG of twins")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def _settings(options: argparse.Namespace) -> TrainSettings:
    """METHODS' losses and weights. The rates are those of a short run from a small base, not those of SD 1.5."""
    return TrainSettings(
        resolution=options.resolution,
        steps=options.phase1 + options.phase2,
        learning_rate=1e-3,
        augment="none",
        validate_every=options.phase1,
        checkpoint_every=options.phase1,
        preview_every=options.phase1,
        preview_pairs=2,
        preview=SamplerSpec(steps=20),
        tokens=TokensSpec(
            tokens=tuple(TokenSpec(name=name, initial=INITIAL.get(name)) for name in TOKENS),
            phase1_steps=options.phase1,
            phase1_learning_rate=5e-3,
            text_learning_rate=1e-4,
        ),
        seed=5,
    )


def _eyes(options: argparse.Namespace, name: str, count: int, seed: int) -> PairSet:
    folder = options.work / name
    if not (folder / "captions.jsonl").exists():
        write_phantoms(folder, count, seed, options.resolution, processes=1)
    return load_pairs(folder, options.resolution, masks=None)


def _kept(options: argparse.Namespace, name: str, make: Any) -> Any:
    """What ``make`` gives, from ``work/NAME.json`` where it is there."""
    path = options.work / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))


class BenchmarkContext(FolderContext):
    """Keeps the model of the end of phase 1, counts the minutes, and stops where it was asked to."""

    def __init__(self, work: Path, phase1: int, stop: int) -> None:
        super().__init__(work / "run", self._say)
        self.work, self.phase1, self.stop, self.begun = work, phase1, stop, time.monotonic()

    def _say(self, stage: str, current: int, total: int) -> None:
        if current % 50 == 0:
            print(f"{time.monotonic() - self.begun:6.0f} s  {stage} {current}/{total}", file=sys.stderr, flush=True)

    def save_checkpoint(self, step: int, folder: Path) -> None:
        """Publish the checkpoint; of the end of phase 1, keep the model."""
        if step == self.phase1:
            shutil.copytree(self.out / f"latest_checkpoints/step_{step:06d}", self.work / "phase1", dirs_exist_ok=True)
        super().save_checkpoint(step, folder)
        (self.work / "minutes.json").write_text(json.dumps((time.monotonic() - self.begun) / 60))
        if step == self.stop:
            raise Cancelled("stopped where it was asked to")


def _train(options: argparse.Namespace, settings: TrainSettings, base: Base, pairs: PairSet) -> tuple[Path, float]:
    """Folder of the model of the LAST step, and the minutes of the run (of its last piece, if it was cut)."""
    stop = options.stop or settings.steps
    last = options.work / f"run/latest_checkpoints/step_{stop:06d}"
    if not last.exists():
        with suppress(Cancelled):
            train_pairs(settings, pairs, base, last.parents[1], BenchmarkContext(options.work, options.phase1, stop))
    return last, round(json.loads((options.work / "minutes.json").read_text()), 1)


# --- where tokens look ------------------------------------------------------------------------------------------------


def _overlaps(
    base: Base, settings: TrainSettings, folder: Path | None, data: dict[str, PairSet]
) -> list[dict[str, Any]]:
    """IoU of every token of every held-out eye, its own mask against that of the next eye that has one."""
    model = DualUnet(base, settings) if folder is None else DualUnet.load(folder, base)
    masked, pairs = model.masked, data["held_out"]
    assert masked is not None
    latents = LatentCache(pairs, base.encode_images, turn, model.views, 0)
    structures = [masked.structure(pair) for pair in pairs]
    rows: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        moments = latents.moments(index, Variant())
        x0 = {b: found.mean[None] for b, found in moments.items()}
        valid = {b: found.valid[None] for b, found in moments.items()}
        structure = {name: found[None] for name, found in structures[index].items()}
        sums: dict[str, torch.Tensor] = {}
        for t in TIMESTEPS:
            drawing = rng.generator(9, index, t)
            noise = {b: torch.randn(clean.shape, generator=drawing) for b, clean in x0.items()}
            maps = masked.maps(x0, valid, structure, {b: torch.tensor([t]) for b in x0}, noise)
            sums = {b: sums.get(b, torch.zeros(())) + found[0] / len(TIMESTEPS) for b, found in maps.items()}
        for place, token in enumerate(TOKENS):
            others = [structures[(index + k) % len(pairs)]["targets"][place] for k in range(1, len(pairs))]
            other = next((target for target in others if target.any()), None)
            own = structure["targets"][0, place]
            if not own.any() or other is None:
                continue
            for b, found in sums.items():
                row = {"eye": pair.eye, "token": token, "modality": b, "side": masked.side}
                rows.append(row | {"iou": overlap(found[place], own), "chance": overlap(found[place], other)})
    return rows


def _table(options: argparse.Namespace, measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    table = []
    for token in TOKENS:
        for modality in MODALITIES:
            line: dict[str, Any] = {"token": token, "modality": modality}
            for name, rows in measured.items():
                mine = [row for row in rows if (row["token"], row["modality"]) == (token, modality)]
                for what in ("iou", "chance"):
                    values, eyes = np.array([row[what] for row in mine]), [row["eye"] for row in mine]
                    found = bootstrap.estimate(values, eyes, bootstrap.mean, seed=1, label=what)
                    line[f"{name}, {what}"] = found.to_dict()
                line["side"] = mine[0]["side"]
            before, after = ({r["eye"]: r["iou"] for r in measured[n] if (r["token"], r["modality"]) == (token, modality)} for n in ("before", "phase 2"))  # fmt: skip  # noqa: E501
            rise = np.array([after[eye] - before[eye] for eye in before])
            line["rise"] = bootstrap.estimate(rise, list(before), bootstrap.mean, seed=1, label="rise").to_dict()
            table.append(line)
    return table


# --- what tokens draw -------------------------------------------------------------------------------------------------


def _draw(options: argparse.Namespace, base: Base, folder: Path) -> dict[str, list[tuple[Image8, Image8]]]:
    """CF and FA of each arm; arms are twins: pair i begins with the same noise in each."""
    model = DualUnet.load(folder, base)
    batch = 2
    drawn: dict[str, list[tuple[Image8, Image8]]] = {}
    for arm, tokens in ARMS.items():
        where = options.work / ("drawn" if options.guidance == 1 else f"drawn-{options.guidance:g}") / arm
        sampler = PairSampler(
            model, SamplerSpec(steps=20, guidance_scale=options.guidance), options.resolution, batch, tokens=tokens
        )
        for first in range(0, options.drawn, batch):
            missing = [i for i in range(first, first + batch) if not (where / f"fa/{i:06d}.png").exists()]
            if not missing:
                continue
            indices = list(range(first, first + batch))
            for pair in sampler.draw(indices, [rng.derive_seed(11, "drawn", i) for i in indices]):
                pair.save(where)
            print(f"drawn {arm} {first + batch}/{options.drawn}", file=sys.stderr, flush=True)
        drawn[arm] = [
            (np.asarray(Image.open(where / f"cf/{i:06d}.png")), np.asarray(Image.open(where / f"fa/{i:06d}.png")))
            for i in range(options.drawn)
        ]
    return drawn


def disc_score(cf: Image8) -> float:
    """How much the brightest round spot of the size of a disc stands out of its surroundings, in grey levels.

    Mean green inside a disc's radius less the mean of the ring around it, at the best place inside the aperture.
    """
    side = cf.shape[0]
    seen = (cf.max(axis=2) > 12).astype(np.float32)
    margin = cv2.erode(seen, np.ones((3, 3), np.uint8), iterations=max(1, side // 24))
    green = np.where(seen > 0, cf[..., 1], 0).astype(np.float32)
    inner, ring = _ring(side, 0.0, 0.05), _ring(side, 0.085, 0.14)
    bright = cv2.filter2D(green, -1, inner / inner.sum())
    around = cv2.filter2D(green, -1, ring / ring.sum()) / np.maximum(cv2.filter2D(seen, -1, ring / ring.sum()), 1e-3)
    return float(np.where(margin > 0, bright - around, -255).max())


def _ring(side: int, inner: float, outer: float) -> NDArray[np.float32]:
    reach = math.ceil(outer * side)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] / side
    radius: NDArray[np.float64] = np.hypot(x, y)
    return ((radius >= inner) & (radius < outer)).astype(np.float32)


def _disc_eyes(options: argparse.Namespace, seed: int, count: int) -> tuple[list[float], list[float]]:
    """Scores of procedural photographs with their disc, and with the disc painted over from its surroundings."""
    with_disc, without = [], []
    for index in range(count):
        eye = make_phantom(rng.derive_seed(seed, "disc", index), options.resolution)
        hole = cv2.dilate(eye.masks["disc"].astype(np.uint8), np.ones((3, 3), np.uint8), iterations=4)
        bgr = cv2.inpaint(np.ascontiguousarray(eye.cf[..., ::-1]), hole, 5, cv2.INPAINT_TELEA)
        with_disc.append(disc_score(eye.cf))
        without.append(disc_score(np.ascontiguousarray(bgr[..., ::-1])))
    return with_disc, without


def _discs(options: argparse.Namespace, drawn: dict[str, list[tuple[Image8, Image8]]]) -> dict[str, Any]:
    """Rates of photographs with a disc; the detector's threshold is set on some eyes, its accuracy stated on others."""

    def calibrated() -> dict[str, float]:
        there, gone = _disc_eyes(options, 303, 60)
        levels = sorted([*there, *gone])
        threshold = max(levels, key=lambda t: sum(s >= t for s in there) + sum(s < t for s in gone))
        held_there, held_gone = _disc_eyes(options, 404, 60)
        found, false = (sum(s >= threshold for s in scores) for scores in (held_there, held_gone))
        return {"threshold": threshold, "eyes": 60, "sensitivity": found / 60, "specificity": 1 - false / 60}

    detector = _kept(options, "disc_detector", calibrated)
    seen = {arm: [disc_score(cf) >= detector["threshold"] for cf, _ in pairs] for arm, pairs in drawn.items()}
    return {"detector": detector, "rates": {arm: _rate(hits) for arm, hits in seen.items()}} | {
        "twins": _twins(seen["all"], seen["without_disc"])
    }


def _lesions(options: argparse.Namespace, drawn: dict[str, list[tuple[Image8, Image8]]]) -> dict[str, Any] | None:
    """Rates of photographs in which the classifier of findings sees a large one; None without its weights."""
    try:
        classifier = FindingsClassifier.load()
    except CffaError as error:
        print(f"lesions are not judged: {error}", file=sys.stderr)
        return None

    def seen_in(pairs: list[tuple[Image8, Image8]]) -> list[bool]:
        answers = []
        for cf, _ in pairs:
            tensor = torch.from_numpy(cf.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
            found = classifier.predict("cf", tensor)
            answers.append(max(float(found[name]) for name in LARGE_FINDINGS) >= 0.5)
        return answers

    def on_eyes() -> dict[str, Any]:
        """The same question on held-out procedural eyes, as they are and without findings."""
        there: list[tuple[Image8, Image8]] = []
        none: list[tuple[Image8, Image8]] = []
        for index in range(30):
            seed = rng.derive_seed(505, "lesion", index)
            for kept, findings in ((there, frozenset(LARGE_FINDINGS)), (none, frozenset[str]())):
                eye = make_phantom(seed, options.resolution, findings=findings)
                kept.append((eye.cf, eye.fa))
        return {"eyes": 30, "sensitivity": float(np.mean(seen_in(there))), "specificity": 1 - float(np.mean(seen_in(none)))}  # fmt: skip  # noqa: E501

    eyes = _kept(options, "lesion_detector", on_eyes)
    seen = {arm: seen_in(pairs) for arm, pairs in drawn.items()}
    return {"detector": eyes, "rates": {arm: _rate(hits) for arm, hits in seen.items()}} | {
        "twins": _twins(seen["all"], seen["without_lesion"])
    }


def _rate(hits: list[bool]) -> dict[str, Any]:
    interval = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return {"n": len(hits), "rate": sum(hits) / len(hits), "low": interval.low, "high": interval.high}


def _twins(with_token: list[bool], without: list[bool]) -> dict[str, Any]:
    """How many twins lost the structure with the token, how many gained it, and the sign test of the two."""
    lost = sum(a and not b for a, b in zip(with_token, without, strict=True))
    gained = sum(b and not a for a, b in zip(with_token, without, strict=True))
    p = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    return {"lost": lost, "gained": gained, "p": float(p)}


# --- what is shown ----------------------------------------------------------------------------------------------------


def _sheet(drawn: dict[str, list[tuple[Image8, Image8]]], path: Path, rows: int = 6, cell: int = 128) -> None:
    sheet = Image.new("RGB", (len(ARMS) * (2 * cell + 12), rows * cell + 22), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (arm, pairs) in enumerate(drawn.items()):
        left = column * (2 * cell + 12)
        pen.text((left + 4, 5), arm.replace("_", " "), "black")
        for row in range(rows):
            for place, image in enumerate(pairs[row]):
                shown = Image.fromarray(image).convert("RGB").resize((cell, cell))
                sheet.paste(shown, (left + place * cell, 22 + row * cell))
    write_png(path.parent, path.name, np.asarray(sheet))


def _print(result: dict[str, Any]) -> None:
    def said(found: dict[str, Any]) -> str:
        return f"{found['value']:.2f} ({found['low']:.2f} to {found['high']:.2f})"

    print("| token | image | N | before | phase 1 | phase 2 | other eye's mask | rise |\n" + "|---" * 8 + "|")
    for line in result["attention"]:
        cells = [said(line[f"{name}, iou"]) for name in ("before", "phase 1", "phase 2")]
        cells += [said(line["phase 2, chance"]), said(line["rise"])]
        print(f"| {line['token']} | {line['modality'].upper()} | {line['rise']['n']} | {' | '.join(cells)} |")
    for what in ("disc", "lesion"):
        if result[what]:
            print(f"\n{what}: detector {result[what]['detector']}, twins {result[what]['twins']}")
            for arm, rate in result[what]["rates"].items():
                print(f"  {arm}: {rate['rate']:.2f} ({rate['low']:.2f} to {rate['high']:.2f}), N = {rate['n']}")


if __name__ == "__main__":
    main()
