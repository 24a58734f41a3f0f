"""Is the captioned model right? Trained small on procedural eyes with captions, measured on eyes it never saw.

Renders the eyes, trains (resumable), and measures on the held-out eyes: retrieval both ways, captions against the known
ones, and whether the findings that a text names are in the picture drawn of it, as the findings classifier sees them;
by diffusion, by direct decoding, and with shuffled captions. Every step leaves its result in the work folder and is
skipped when it is there, so a run that was cut goes on.

    python benchmarks/captioned.py --work runs/captioned

prints Markdown tables, writes benchmarks/results/captioned.json and the sheet docs/images/captioned.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from scipy.stats import rankdata

from cffa_core import rng
from cffa_core.captioned.model import CaptionedModel
from cffa_core.captioned.model_folder import load_captioned, read_captioned_card
from cffa_core.captioned.scores import named, same_words, token_f1
from cffa_core.captioned.text_coder import CaptionSampling
from cffa_core.data import phantom
from cffa_core.data.captions import read_captions
from cffa_core.data.sheet import BACKGROUND, GAP, HEADING, LABEL, MARGIN
from cffa_core.evaluation.bootstrap import Statistic, Values, estimate, mean
from cffa_core.evaluation.findings import FindingsClassifier
from cffa_core.jobs.captioned_spec import CaptionedSettings, CaptionedSizes, CaptionedTrainSettings
from cffa_core.jobs.context import FolderContext
from cffa_core.recipes.captioned import BATCH, draw_pictures, run_captioned_training
from cffa_core.recipes.captioned_data import read_pictures, signed
from cffa_core.recipes.captioned_report import wrapped

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "captioned.json"
SHEET = HERE.parent / "docs" / "images" / "captioned.png"
# What a caption of a colour photograph may name, and what the classifier calls it.
WORDS = {phantom.WORDS[finding]: finding for finding in phantom.SEEN_IN["cf"]}
# About a third of the specification's widths: with these, one core trains in about half an hour.
SIZES = CaptionedSizes(unet=(64, 128, 256), image=16, decoder=64, text=128)
CELL = 150


def main() -> None:
    """Do what is missing, print the tables, write JSON and sheet."""
    options = _options()
    work: Path = options.work
    torch.set_num_threads(options.threads)
    for name, count, seed in (("train", options.train_eyes, 2027), ("held-out", options.eyes, 2028)):
        _render(work / "data" / name, count, seed)
    run = work / "model-cf"
    if not (run / "done").is_file():
        context = FolderContext(run / "context", _progress)
        run_captioned_training(_settings(options), work / "data" / "train", run, context)
        (run / "done").touch()
    model, _ = load_captioned(run / "best_checkpoint")
    eyes = _held_out(work / "data" / "held-out", options.eyes)
    arms = _arms(model, eyes, options, work)
    truth = np.array([[word in named(caption, tuple(WORDS)) for word in WORDS] for caption in eyes.captions], float)
    result = {
        "question": "is the captioned model right, and does the text decide what is drawn?",
        "training": {"eyes": options.train_eyes, **_settings(options).model_dump(mode="json")},
        "model": {
            name: read_captioned_card(run / "best_checkpoint")[name] for name in ("step", "parameters", "validation")
        },
        "held_out_eyes": len(eyes.names),
        "captions": {text: eyes.captions.count(text) for text in sorted(set(eyes.captions))},
        "drawing": {"ddim_steps": options.ddim_steps, "guidance_scale": options.guidance},
        "retrieval": _retrieval(model, eyes),
        "captioning": _captioning(model, eyes, truth),
        "findings_in_pictures": _findings(arms, truth, eyes.names),
        "device": rng.cpu_model(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _sheet(eyes, arms, options.sheet)
    print(_tables(result))


class Eyes:
    """Held-out eyes: names, captions and pictures ``(N, 3, 224, 224)`` uint8."""

    def __init__(self, names: list[str], captions: list[str], pictures: torch.Tensor) -> None:
        self.names, self.captions, self.pictures = names, captions, pictures


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/captioned"))
    parser.add_argument("--train-eyes", type=int, default=1500)
    parser.add_argument("--eyes", type=int, default=208, help="held-out eyes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ddim-steps", type=int, default=10)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--sheet", type=Path, default=SHEET)
    return parser.parse_args()


def _settings(options: argparse.Namespace) -> CaptionedTrainSettings:
    return CaptionedTrainSettings(
        sizes=SIZES,
        batch_size=32,
        drawn_per_step=8,
        contrastive_weight=2.0,
        precision="bf16",
        learning_rate=1e-3,
        steps=options.steps,
        validate_every=100,
        checkpoint_every=100,
        holdout=0.05,
        seed=2027,
    )


def _render(folder: Path, count: int, seed: int) -> None:
    """Eyes at 256 px, without their masks: with them a folder has more files than the check of data sets takes."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        phantom.write_phantoms(partial, count, seed, 256, processes=1)
        shutil.rmtree(partial / "masks")
        partial.rename(folder)


def _held_out(folder: Path, count: int) -> Eyes:
    known = read_captions(folder)
    read = list(read_pictures(folder, "cf", count))
    pictures = torch.from_numpy(np.stack([image for _, image, _ in read])).permute(0, 3, 1, 2).contiguous()
    names = [pair.name for pair, _, _ in read]
    return Eyes(names, [str(known[name].cf) for name in names], pictures)


def _arms(model: CaptionedModel, eyes: Eyes, options: argparse.Namespace, work: Path) -> dict[str, torch.Tensor]:
    """The pictures that are judged, uint8: real, through encoder and decoder, by diffusion, by direct decoding."""
    drawing = CaptionedSettings(
        task="text_to_image", texts=(eyes.captions[0],), ddim_steps=options.ddim_steps, guidance_scale=options.guidance
    )
    direct = drawing.model_copy(update={"use_diffusion": False})

    def rebuilt(rows: list[int]) -> torch.Tensor:
        embedding = model.image_encoder(signed(eyes.pictures[rows]))[0]
        drawn: torch.Tensor = model.image_decoder(model.image_decoder.latent(embedding)).clamp(-1, 1)
        return ((drawn + 1) * 127.5).round().to(torch.uint8)

    def drawn(settings: CaptionedSettings) -> Callable[[list[int]], torch.Tensor]:
        def draw(rows: list[int]) -> torch.Tensor:
            text = torch.stack([model.embed_text(eyes.captions[row]) for row in rows])
            return draw_pictures(model, text, [rng.derive_seed(7, "benchmark", row) for row in rows], settings)

        return draw

    made = {"real": eyes.pictures}
    key = f"{options.ddim_steps}-{options.guidance:g}"
    for name, kept, make in (
        ("reconstruction", "reconstruction", rebuilt),
        ("diffusion", f"diffusion-{key}", drawn(drawing)),
        ("direct", "direct", drawn(direct)),
    ):
        path = work / f"pictures-{kept}.safetensors"
        if not path.is_file():
            parts = []
            with torch.no_grad():
                for start in range(0, len(eyes.names), BATCH):
                    parts.append(make(list(range(start, min(start + BATCH, len(eyes.names))))))
                    _progress(name, start, len(eyes.names))
            save_file({"pictures": torch.cat(parts)}, path)
        made[name] = load_file(path)["pictures"]
    return made


@torch.no_grad()
def _retrieval(model: CaptionedModel, eyes: Eyes) -> dict[str, Any]:
    """Retrieval@1. Captions repeat, so candidates are captions, not rows: the different captions of the set.

    Picture to text: the nearest of all captions. Text to picture: each eye's caption against that eye and one other eye
    for each other caption (seeded). One candidate in each is right, so chance is 1 / number of captions.
    """
    texts = sorted(set(eyes.captions))
    text = torch.nn.functional.normalize(torch.stack([model.embed_text(t) for t in texts]), dim=1)
    batches = [eyes.pictures[start : start + BATCH] for start in range(0, len(eyes.names), BATCH)]
    image = torch.nn.functional.normalize(torch.cat([model.embed_images(signed(b)) for b in batches]), dim=1)
    own = np.array([texts.index(caption) for caption in eyes.captions])
    cosines = (image @ text.T).numpy()
    to_text = (cosines.argmax(axis=1) == own).astype(float)
    to_image = []
    for row, caption in enumerate(own):
        draws = np.random.default_rng(rng.derive_seed(7, "gallery", row))
        others = [int(draws.choice(np.flatnonzero(own == other))) for other in range(len(texts)) if other != caption]
        to_image.append(float(cosines[row, caption] > cosines[others, caption].max()))
    most = np.bincount(own).max() / len(own)
    return {
        "captions": len(texts),
        "chance": round(1 / len(texts), 4),
        "always_the_commonest_caption": round(float(most), 4),
        "image_to_text": _estimate(to_text, eyes.names),
        "image_to_text_mean_over_captions": _estimate(np.stack([own, to_text], axis=1), eyes.names, _over_classes),
        "text_to_image": _estimate(np.array(to_image), eyes.names),
    }


def _over_classes(values: Values) -> float:
    """Mean over captions of the share of hits among the eyes with that caption."""
    return float(np.mean([values[values[:, 0] == caption, 1].mean() for caption in np.unique(values[:, 0])]))


def _captioning(model: CaptionedModel, eyes: Eyes, truth: NDArray[np.float64]) -> dict[str, Any]:
    """Captions as drawn by default, and the likeliest ones; beside them the commonest caption for every eye."""
    commonest = max(set(eyes.captions), key=eyes.captions.count)
    ways = {"sampled": CaptionSampling(), "likeliest": CaptionSampling(sampled=False, repetition_penalty=1.0)}
    said = {
        way: [
            model.describe(signed(picture), 1, sampling, rng.derive_seed(7, "caption", row))[0]
            for row, picture in enumerate(eyes.pictures)
        ]
        for way, sampling in ways.items()
    }
    said["commonest_caption"] = [commonest] * len(eyes.names)
    result = {}
    for way, captions in said.items():
        found = np.array([[word in named(caption, tuple(WORDS)) for word in WORDS] for caption in captions], float)
        pairs = list(zip(captions, eyes.captions, strict=True))
        result[way] = {
            "token_f1": _estimate(np.array([token_f1(*pair) for pair in pairs]), eyes.names),
            "word_for_word": _estimate(np.array([float(same_words(*pair)) for pair in pairs]), eyes.names),
            "exact_findings": _estimate((found == truth).all(axis=1).astype(float), eyes.names),
            "balanced_accuracy": {
                word: _estimate(np.stack([truth[:, n], found[:, n]], axis=1), eyes.names, _balanced)
                for n, word in enumerate(WORDS)
            },
        }
    return result


def _findings(arms: dict[str, torch.Tensor], truth: NDArray[np.float64], names: list[str]) -> dict[str, Any]:
    """What the classifier sees in each arm's pictures, against the findings that the caption names.

    ``shuffled``: the diffusion's pictures against the captions of other eyes.
    """
    classifier = FindingsClassifier.load()
    seen = {}
    for arm, pictures in arms.items():
        parts = []
        for start in range(0, len(names), BATCH):
            found = classifier.predict("cf", signed(pictures[start : start + BATCH]))
            parts.append(np.stack([found[finding].double().numpy() for finding in WORDS.values()], axis=1))
            _progress(f"judging {arm}", start, len(names))
        seen[arm] = np.concatenate(parts)
    order = np.random.default_rng(rng.derive_seed(7, "shuffle")).permutation(len(names))
    seen["shuffled"] = seen["diffusion"][order]
    result: dict[str, Any] = {"classifier": [row for row in classifier.card["measured"] if row["modality"] == "cf"]}
    for arm, likely in seen.items():
        said = (likely >= 0.5).astype(float)
        result[arm] = {
            "exact_findings": _estimate((said == truth).all(axis=1).astype(float), names),
            "accuracy": _estimate((said == truth).mean(axis=1), names),
            "balanced_accuracy": _estimate(np.concatenate([truth, said], axis=1), names, _mean_balanced),
            "auroc": _estimate(np.concatenate([truth, likely], axis=1), names, _mean_auroc),
            "auroc_by_finding": {
                word: _estimate(np.stack([truth[:, n], likely[:, n]], axis=1), names, _mean_auroc)
                for n, word in enumerate(WORDS)
            },
            "said_to_be_there": dict(zip(WORDS, said.mean(axis=0).round(4).tolist(), strict=True)),
        }
    result["there_in_the_captions"] = dict(zip(WORDS, truth.mean(axis=0).round(4).tolist(), strict=True))
    return result


def _balanced(values: Values) -> float:
    """Mean of the shares said right of what is there and of what is not; (N, 2): truth, said. Chance 0.5."""
    there = values[:, 0] == 1
    return float((values[there, 1].mean() + 1 - values[~there, 1].mean()) / 2)


def _mean_balanced(values: Values) -> float:
    half = values.shape[1] // 2
    return float(np.mean([_balanced(values[:, [n, half + n]]) for n in range(half)]))


def _mean_auroc(values: Values) -> float:
    """Mean over findings of the chance that an eye with it is ranked before one without; (N, 2F). Chance 0.5."""
    half = values.shape[1] // 2
    areas = []
    for n in range(half):
        there = values[:, n] == 1
        ranks, count = rankdata(values[:, half + n]), int(there.sum())
        areas.append((ranks[there].sum() - count * (count + 1) / 2) / (count * (len(there) - count)))
    return float(np.mean(areas))


def _estimate(values: Values, names: list[str], statistic: Statistic = mean) -> dict[str, Any]:
    return estimate(values, names, statistic, label="captioned").to_dict()


def _sheet(eyes: Eyes, arms: dict[str, torch.Tensor], path: Path) -> None:
    """A row for each caption: an eye that has it, the same rebuilt, two drawn by diffusion, one directly."""
    small, font = ImageFont.load_default(12), ImageFont.load_default(14)
    texts = sorted(set(eyes.captions), key=lambda text: (len(text), text))
    heads = ("real", "encoded, decoded", "diffusion", "diffusion", "direct")
    left, width = 190, len(heads)
    size = (left + width * (CELL + GAP) + MARGIN, MARGIN + 30 + len(texts) * (CELL + GAP) + MARGIN)
    made = Image.new("RGB", size, BACKGROUND)
    pen = ImageDraw.Draw(made)
    for column, head in enumerate(heads):
        pen.text((left + column * (CELL + GAP), MARGIN), head, HEADING, font)
    for row, text in enumerate(texts):
        y = MARGIN + 30 + row * (CELL + GAP)
        findings = text.partition("with ")[2] or "no finding named"
        for place, line in enumerate(wrapped(findings, left - MARGIN - 10, small)):
            pen.text((MARGIN, y + CELL // 2 - 20 + 16 * place), line, LABEL, small)
        with_it = [index for index, caption in enumerate(eyes.captions) if caption == text]
        first, second = with_it[0], with_it[-1]
        shown = [
            ("real", first),
            ("reconstruction", first),
            ("diffusion", first),
            ("diffusion", second),
            ("direct", first),
        ]
        for column, (arm, index) in enumerate(shown):
            picture = Image.fromarray(arms[arm][index].permute(1, 2, 0).contiguous().numpy())
            made.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left + column * (CELL + GAP), y))
    made.quantize(128).save(path, optimize=True)


def _tables(result: dict[str, Any]) -> str:
    def cell(found: dict[str, Any]) -> str:
        return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"

    retrieval = result["retrieval"]
    lines = ["| retrieval@1 | value |", "|---|---|"]
    lines += [f"| {name} | {cell(retrieval[name])} |" for name in retrieval if isinstance(retrieval[name], dict)]
    lines += ["", "| captions | token F1 | word for word | exact findings |", "|---|---|---|---|"]
    for way, found in result["captioning"].items():
        lines.append(
            f"| {way} | " + " | ".join(cell(found[n]) for n in ("token_f1", "word_for_word", "exact_findings")) + " |"
        )
    names = ("exact_findings", "accuracy", "balanced_accuracy", "auroc")
    lines += ["", f"| pictures | {' | '.join(names)} |", "|---|---|---|---|---|"]
    for arm in ("real", "reconstruction", "diffusion", "direct", "shuffled"):
        lines.append(f"| {arm} | " + " | ".join(cell(result["findings_in_pictures"][arm][n]) for n in names) + " |")
    return "\n".join(lines)


def _progress(stage: str, current: int, total: int) -> None:
    print(f"\r{stage} {current}/{total}   ", end="", file=sys.stderr)


if __name__ == "__main__":
    main()
