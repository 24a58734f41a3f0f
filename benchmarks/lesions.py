"""Do prompts make lesions? Images drawn with and without a finding in the prompt, judged by the classifier of findings.

Each image drawn with "..., with haemorrhages" has a twin drawn from the same noise without these words, so that the
difference of the two rates is free of what the classifier mistakes for lesions. Procedural eyes with and without the
finding, taken through the base's VAE, say what the classifier could see at best. How much a word changes the encoded
prompt and the predicted noise at all is measured beside it. Every image is a file below the work folder and is drawn
once: a run that was cut goes on, and more pairs or guidances add to what is there.

    python benchmarks/lesions.py --work runs/lesions --pairs 24

prints a Markdown table and writes benchmarks/results/lesions.json and a sheet (--sheet) of twins.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image, ImageDraw

from cffa_core import rng
from cffa_core.data.phantom import Phase, make_caption, make_phantom
from cffa_core.diffusion.losses import NoiseSchedule
from cffa_core.diffusion.sampling import build_scheduler, denoise, draw_noise
from cffa_core.evaluation.bootstrap import estimate
from cffa_core.evaluation.findings import MODALITIES, SEEN, FindingsClassifier, Modality
from cffa_core.jobs.spec import Scheduler
from cffa_core.methods.method import PairMethod, read_card
from cffa_core.methods.registry import METHODS
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.findings import auc

RESULTS = Path(__file__).resolve().parent / "results" / "lesions.json"
PHASE: Phase = "late"  # leakage is brightest then
NOTHING = "nothing"


def main() -> None:
    """Draw what is missing, judge all, print the table, write the JSON."""
    options = _options()
    base = load_base(options.base)
    if options.model:
        base = load_base(read_card(options.model)["base"]["name"])
    model = None if options.model is None else METHODS[read_card(options.model)["method"]].load(options.model, base)
    for index in range(options.pairs):
        for modality in MODALITIES:
            for finding in (NOTHING, *SEEN[modality]):
                _phantom(options, base, modality, finding, index)
                for guidance in options.guidance:
                    _drawn(options, base, model, modality, finding, guidance, index)
        print(f"{index + 1}/{options.pairs} eyes drawn", file=sys.stderr, flush=True)
    classifier = FindingsClassifier.load(options.classifier)
    rows = [
        _judge(options, classifier, modality, finding, arm)
        for arm in ("phantoms", *(f"g{guidance:g}" for guidance in options.guidance))
        for modality in MODALITIES
        for finding in SEEN[modality]
    ]
    result = {
        "what": options.name,
        "base": base.name,
        "model": None if model is None else {"step": model.step, "method": str(model.settings.method)},
        "resolution": options.resolution,
        "images": options.pairs,
        "sampler": {"scheduler": "ddim", "steps": options.steps, "precision": "bf16 autocast"},
        "phase": PHASE,
        "words": _words(options, base, model),
        "device": rng.cpu_model(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[options.name] = result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if options.sheet:
        _sheet(options)
    print(_table(rows))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/lesions"))
    parser.add_argument("--name", default="base alone", help="entry of the JSON, and folder of the images")
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--model", type=Path, help="model folder (dual_unet); without one the base draws alone")
    parser.add_argument("--classifier", type=Path, help="folder of the classifier; without one the shipped one")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=24, help="images of each prompt")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 4.0, 7.5])
    parser.add_argument("--sheet", type=Path, help="write twins of the middle guidance as a PNG here")
    parser.add_argument("--seed", type=int, default=2031)
    return parser.parse_args()


@torch.no_grad()
def _words(options: argparse.Namespace, base: Base, model: PairMethod | None) -> list[dict[str, Any]]:
    """What a word changes: mean distance of the encoded prompts (over their mean length), and of the predicted noise
    (over its own) at three timesteps of a healthy eye. The last row of each modality is the other modality's prompt.
    """
    rows = []
    for modality, other in zip(MODALITIES, reversed(MODALITIES), strict=True):
        prompts = [_prompt(modality, finding) for finding in (NOTHING, *SEEN[modality])] + [_prompt(other, NOTHING)]
        text = base.encode_prompts(prompts)
        image = _eye(options, modality, NOTHING, 0)
        clean, _ = base.encode_images(image)
        alphas = NoiseSchedule.from_config(base.scheduler_config)
        changes = []
        for t in (300, 600, 900):
            noise = torch.randn(clean.shape, generator=rng.generator(options.seed, "words", t))
            noisy = alphas.add_noise(clean, noise, torch.tensor([t]))
            said = torch.cat([_predict(base, model, modality, noisy, torch.tensor(t), one[None]) for one in text])
            changes.append((said - said[:1]).flatten(1).norm(dim=1) / said[0].norm())
        moved = (text - text[:1]).norm(dim=-1).mean(dim=-1) / text[0].norm(dim=-1).mean()
        noise_change = torch.stack(changes).mean(dim=0)
        for place, name in enumerate((*SEEN[modality], f"prompt of {other.upper()}"), start=1):
            row = {"prompt": float(moved[place]), "noise": float(noise_change[place])}
            rows.append({"modality": modality, "word": name, **{key: float(f"{v:.3g}") for key, v in row.items()}})
    return rows


def _predict(
    base: Base, model: PairMethod | None, modality: Modality, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The noise that the base, or the model on it, sees in ``x`` (R, C, h, w)."""
    if model is None:
        said: torch.Tensor = base.unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
        return said.float()
    return model.predict_noise(x, t, text, [modality] * len(x))


def _prompt(modality: Modality, finding: str) -> str:
    """The caption of a phantom with this finding and no other."""
    return make_caption(modality, () if finding == NOTHING else (finding,), PHASE if modality == "fa" else None)


def _place(options: argparse.Namespace, arm: str, modality: Modality, finding: str, index: int) -> Path:
    folder: Path = options.work / (f"phantoms-{options.resolution}" if arm == "phantoms" else options.name)
    return folder / arm / f"{modality}-{finding}" / f"{index:04d}.png"


@torch.no_grad()
def _phantom(options: argparse.Namespace, base: Base, modality: Modality, finding: str, index: int) -> None:
    """An eye with exactly this finding, or none, after the base's VAE."""
    path = _place(options, "phantoms", modality, finding, index)
    if path.exists():
        return
    image = _eye(options, modality, finding, index)
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = base.encode_images(image)
        decoded = base.decode(mean)
    _write(path, modality, decoded)


def _eye(options: argparse.Namespace, modality: Modality, finding: str, index: int) -> torch.Tensor:
    """Procedural eye ``index`` with this finding alone, (1, 3, H, H) in [-1, 1]."""
    findings: frozenset[str] = frozenset() if finding == NOTHING else frozenset({finding})
    seed = rng.derive_seed(options.seed, "lesions", index)
    phantom = make_phantom(seed, options.resolution, findings=findings, phase=PHASE)
    pixels = phantom.cf if modality == "cf" else np.repeat(phantom.fa[..., None], 3, axis=2)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def _drawn(
    options: argparse.Namespace,
    base: Base,
    model: PairMethod | None,
    modality: Modality,
    finding: str,
    guidance: float,
    index: int,
) -> None:
    """One image from noise that depends on ``index`` and modality alone; plain classifier-free guidance, DDIM."""
    path = _place(options, f"g{guidance:g}", modality, finding, index)
    if path.exists():
        return
    prompts = [_prompt(modality, finding)] if guidance == 1 else ["", _prompt(modality, finding)]
    text = base.encode_prompts(prompts)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        rows = x.expand(len(prompts), -1, -1, -1)
        said = _predict(base, model, modality, rows, t, text)
        return said if len(prompts) == 1 else said[:1] + guidance * (said[1:] - said[:1])

    scheduler = build_scheduler(Scheduler.DDIM, base.scheduler_config, options.steps)
    seed = rng.derive_seed(options.seed, modality, index)
    shape = base.latent_shape(options.resolution)
    noise = draw_noise([seed], shape, (modality,), "shared", None, "z0")
    with torch.autocast("cpu", torch.bfloat16):
        latent = denoise(predict, scheduler, noise, lambda step: torch.zeros(shape))
        decoded = base.decode(latent)
    _write(path, modality, decoded)


def _write(path: Path, modality: Modality, image: torch.Tensor) -> None:
    pixels = ((image[0].float() + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    if modality == "fa":
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True).round().astype(np.uint8), 3, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial.png")
    cv2.imwrite(str(partial), cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2BGR))
    partial.replace(path)


def _judge(
    options: argparse.Namespace, classifier: FindingsClassifier, modality: Modality, finding: str, arm: str
) -> dict[str, Any]:
    """Rates at which the finding is seen with and without its word, their difference, and the AUC, over the twins."""
    scores, distances = [], []
    for index in range(options.pairs):
        twins = [_read(_place(options, arm, modality, prompt, index)) for prompt in (finding, NOTHING)]
        scores.append([float(classifier.predict(modality, image)[finding]) for image in twins])
        distances.append(float((twins[0] - twins[1]).abs().mean()) * 127.5)
    names = [str(index) for index in range(options.pairs)]
    table = np.array(scores)
    rates = (table >= 0.5).astype(np.float64)
    label = f"{arm}-{modality}-{finding}"
    return {
        "arm": arm,
        "modality": modality,
        "finding": finding,
        "with": estimate(rates[:, 0], names, label=label).to_dict(),
        "without": estimate(rates[:, 1], names, label=label).to_dict(),
        "difference": estimate(rates[:, 0] - rates[:, 1], names, label=label).to_dict(),
        "auc": estimate(table, names, _twin_auc, label=label).to_dict(),
        "grey_levels_between_twins": round(float(np.mean(distances)), 3),
    }


def _read(path: Path) -> torch.Tensor:
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def _twin_auc(table: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """How well the classifier tells images with the word from their twins."""
    truth = np.repeat([1.0, 0.0], len(table))
    return auc(np.stack([table.T.reshape(-1), truth], axis=1))


def _sheet(options: argparse.Namespace) -> None:
    """Twins of two eyes: without a finding, and with each, at the middle guidance."""
    guidance = sorted(options.guidance)[len(options.guidance) // 2]
    size, gap, head = 150, 4, 16
    columns = [(m, f) for m in MODALITIES for f in (NOTHING, *SEEN[m])]
    sheet = Image.new("RGB", (len(columns) * (size + gap), head + 2 * (size + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (modality, finding) in enumerate(columns):
        pen.text((column * (size + gap) + 4, 2), f"{modality.upper()}: {finding}", fill="black")
        for row in range(2):
            with Image.open(_place(options, f"g{guidance:g}", modality, finding, row)) as image:
                small = image.resize((size, size), Image.Resampling.LANCZOS)
            sheet.paste(small, (column * (size + gap), head + row * (size + gap)))
    options.sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.sheet, optimize=True)


def _table(rows: list[dict[str, Any]]) -> str:
    lines = ["| arm | image | finding | with the word | without | difference | AUC | grey levels |", "|---" * 8 + "|"]
    for row in rows:
        cells = []
        for name in ("with", "without", "difference", "auc"):
            found = row[name]
            ends = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
            cells.append(f"{found['value']:.2f}{ends}")
        cells.append(f"{row['grey_levels_between_twins']:.2f}")
        lines.append(f"| {row['arm']} | {row['modality'].upper()} | {row['finding']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
