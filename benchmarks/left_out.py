"""Does a token that is left out leave its structure out, where the base knows the token's word? (METHODS 6)

Trains `dual_unet` with tokens on procedural pairs from `tiny`, gently: `<lesion>` begins as a word that the base knows,
prompts have the form of the captions that taught it (docs/tiny-base.md), no phase trains the tokens alone. Then draws
twins from the same noise, with all tokens and without `<lesion>`, before and after the training, and the classifier of
findings judges both images of each. A twin has lost a lesion that is seen with the token and not without it.

    python -m benchmarks.left_out --work runs/left_out [--sheet twins.png]

prints the table and writes benchmarks/results/left_out.json. A run that was cut goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import binomtest

from benchmarks.timing import circumstances
from cffa_core import rng
from cffa_core.data.pairs import load_pairs
from cffa_core.data.phantom import make_phantom, write_phantoms
from cffa_core.evaluation.findings import FindingsClassifier, Modality
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import SamplerSpec, TokenSpec, TokensSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import PairSampler, write_png
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.train import train_pairs

RESULTS = Path(__file__).resolve().parent / "results" / "left_out.json"
# Findings first, as in the captions.
TOKENS = (TokenSpec(name="lesion", initial="haemorrhages"), *(TokenSpec(name=n) for n in ("disc", "macula", "vessel")))
TEMPLATE = "{prompt}, with {tokens}"
ARMS = {"all tokens": tuple(token.name for token in TOKENS), "without <lesion>": ("disc", "macula", "vessel")}
# What is judged, the first as the question; the word is that of haemorrhages.
JUDGED: tuple[tuple[Modality, str], ...] = (("fa", "haemorrhage"), ("cf", "haemorrhage"), ("cf", "exudate"))
SEEN, BATCH, STEPS = 0.5, 4, 20
Image8 = NDArray[np.uint8]


def main() -> None:
    """Do what is missing, print the table, write the JSON."""
    options = _options()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    base, classifier = load_base("tiny"), FindingsClassifier.load()
    trained = _train(options, base)
    untrained = DualUnet(base, _settings(options))
    result: dict[str, Any] = circumstances("cpu", "wall") | {
        "base_digest": base.digest,
        "setting": {name: getattr(options, name) for name in ("resolution", "pairs", "steps", "drawn", "guidance")},
        "tokens": [token.model_dump() for token in TOKENS],
        "template": TEMPLATE,
        "judged_on_procedural_eyes": [_accuracy(options, classifier, m, finding) for m, finding in JUDGED],
        "models": {},
    }
    for name, model in (("before", untrained), ("trained", DualUnet.load(trained, base))):
        drawn = {arm: _draw(options, model, options.work / name / arm, tokens) for arm, tokens in ARMS.items()}
        result["models"][name] = [_twins(classifier, drawn, m, finding) for m, finding in JUDGED]
        if options.sheet and name == "trained":
            _sheet(drawn, options.sheet)
    options.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print("| model | judged | all tokens | without `<lesion>` | lost / gained | p (sign test) |\n" + "|---" * 6 + "|")
    for name, rows in result["models"].items():
        for row in rows:
            seen = " | ".join(f"{row['seen'][arm]} of {options.drawn}" for arm in ARMS)
            print(f"| {name} | {row['judged']} | {seen} | {row['lost']} / {row['gained']} | {row['p']:.3g} |")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of everything that is kept")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=60, help="procedural pairs to train on")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--drawn", type=int, default=48, help="pairs drawn with each set of tokens")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=Path, help="PNG of twins")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def _settings(options: argparse.Namespace) -> TrainSettings:
    return TrainSettings(
        resolution=options.resolution,
        steps=options.steps,
        learning_rate=5e-4,
        augment="none",
        validate_every=options.steps,
        checkpoint_every=options.steps,
        preview_pairs=0,
        tokens=TokensSpec(tokens=TOKENS, template=TEMPLATE, phase1_steps=0),
        seed=5,
    )


def _train(options: argparse.Namespace, base: Base) -> Path:
    """Folder of the model after the last step."""
    folder = options.work / f"run/latest_checkpoints/step_{options.steps:06d}"
    if not folder.exists():
        data = options.work / "pairs"
        if not data.exists():
            write_phantoms(data, options.pairs, 101, options.resolution, processes=1)
        pairs = load_pairs(data, options.resolution, masks=None)
        train_pairs(_settings(options), pairs, base, options.work / "run", FolderContext(options.work / "run", _say))
    return Path(folder)


def _say(stage: str, current: int, total: int) -> None:
    print(f"\r{stage} {current}/{total}   ", end="", file=sys.stderr, flush=True)


def _draw(
    options: argparse.Namespace, model: DualUnet, folder: Path, tokens: tuple[str, ...]
) -> list[tuple[Image8, Image8]]:
    """CF and FA of each pair; pair i begins with the same noise whatever the tokens and the model."""
    sampler: PairSampler | None = None
    spec = SamplerSpec(steps=STEPS, guidance_scale=options.guidance, initial_noise="shared")
    for first in range(0, options.drawn, BATCH):
        indices = list(range(first, min(first + BATCH, options.drawn)))
        if all((folder / f"fa/{i:06d}.png").exists() for i in indices):
            continue
        sampler = sampler or PairSampler(model, spec, options.resolution, BATCH, tokens=tokens)
        for pair in sampler.draw(indices, [rng.derive_seed(23, "left out", i) for i in indices]):
            pair.save(folder)
        _say(f"drawing {folder.name}", indices[-1] + 1, options.drawn)

    def read(modality: str, index: int) -> Image8:
        return np.asarray(Image.open(folder / f"{modality}/{index:06d}.png").convert("RGB"))

    return [(read("cf", i), read("fa", i)) for i in range(options.drawn)]


def _is_seen(classifier: FindingsClassifier, modality: Modality, finding: str, image: Image8) -> bool:
    signed = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    return float(classifier.predict(modality, signed)[finding]) >= SEEN


def _twins(
    classifier: FindingsClassifier, drawn: dict[str, list[tuple[Image8, Image8]]], modality: Modality, finding: str
) -> dict[str, Any]:
    """In how many pairs of each arm the finding is seen, how many twins lost or gained it, and the sign test."""
    place = 0 if modality == "cf" else 1
    seen = {
        arm: [_is_seen(classifier, modality, finding, pair[place]) for pair in pairs] for arm, pairs in drawn.items()
    }
    with_token, without = seen.values()
    lost = sum(a and not b for a, b in zip(with_token, without, strict=True))
    gained = sum(b and not a for a, b in zip(with_token, without, strict=True))
    p = binomtest(lost, lost + gained, alternative="greater").pvalue if lost + gained else 1.0
    counts = {arm: sum(hits) for arm, hits in seen.items()}
    return {"judged": f"{finding} in {modality.upper()}", "seen": counts, "lost": lost, "gained": gained, "p": float(p)}


def _accuracy(
    options: argparse.Namespace, classifier: FindingsClassifier, modality: Modality, finding: str, eyes: int = 30
) -> dict[str, Any]:
    """How often the classifier is right on held-out procedural eyes, with this finding alone and without any."""
    right = {}
    for name, findings in (("sensitivity", frozenset({finding})), ("specificity", frozenset[str]())):
        seen = 0
        for index in range(eyes):
            eye = make_phantom(rng.derive_seed(505, "left out", index), options.resolution, findings=findings)
            image = eye.cf if modality == "cf" else np.repeat(eye.fa[..., None], 3, axis=2)
            seen += _is_seen(classifier, modality, finding, image)
        right[name] = (seen if findings else eyes - seen) / eyes
    return {"judged": f"{finding} in {modality.upper()}", "eyes": eyes, **right}


def _sheet(drawn: dict[str, list[tuple[Image8, Image8]]], path: Path, rows: int = 6) -> None:
    """Twins row by row: CF and FA with all tokens, a gap, CF and FA without."""
    lines = []
    for (cf, fa), (other_cf, other_fa) in list(zip(*drawn.values(), strict=True))[:rows]:
        gap = np.full((len(cf), len(cf) // 16, 3), 255, np.uint8)
        lines.append(np.concatenate((cf, fa, gap, other_cf, other_fa), axis=1))
    write_png(path.parent, path.name, np.concatenate(lines))


if __name__ == "__main__":
    main()
