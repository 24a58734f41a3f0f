"""Does an edit do what it says, and nothing else? Findings added to and removed from procedural eyes, and judged.

Each finding is added to healthy eyes and removed from eyes that have it, with the words of the phantoms' captions. A
procedural eye has a twin with the finding and without it, so that what is left of a lesion is measured in pixels, too.
The classifier of findings (docs/findings.md) says how often it sees the finding before and after; the ridge score says
whether CF and FA still register. Every edit is a folder below the work folder and is made once: a run that was cut goes
on, and more eyes add to what is there.

    python benchmarks/editing.py --work runs/editing --eyes 6

prints a Markdown table and writes benchmarks/results/editing.json and a sheet for each edit of each eye in the work
folder. `--model` and `--base` take another model, `--name` what the result is called. `--knowing` puts a model in their
place that is made to know each lesion (see `KnowsFinding`): what is missing there is the method's and the VAE's.
`--inside` draws an area around the place where the twin has the lesion, as a user may, and edits all of it there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cffa_core import rng
from cffa_core.data.contracts import PairImages
from cffa_core.data.field_of_view import field_of_view
from cffa_core.data.phantom import CF_PROMPT, FA_PROMPT, FINDINGS, WORDS, Phantom, Phase, make_phantom
from cffa_core.diffusion.losses import NoiseSchedule
from cffa_core.editing.denoiser import BaseAlone
from cffa_core.editing.editor import PairEditor, SourcePair
from cffa_core.evaluation.alignment import normalised, score_set
from cffa_core.evaluation.bootstrap import estimate
from cffa_core.evaluation.findings import MODALITIES, SEEN, SHIPPED, FindingsClassifier, Modality
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.edit_spec import EditSettings
from cffa_core.models.base import Base, load_base
from cffa_core.recipes.edit import edit_part, load_editor

RESULTS = Path(__file__).resolve().parent / "results" / "editing.json"
PHASE: Phase = "late"  # leakage is brightest then
SCORE = "ridge_correlation"
MARGIN = 0.05  # what A may lose before an edit counts as having moved the images against each other
INSIDE = 8  # pixels
HELD_OUT = 990_000  # no training of the shipped weights drew from this seed


def main() -> None:
    """Make the edits that are missing, judge all, print the table, write the JSON."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    arms = [(finding, direction) for finding in options.findings for direction in ("add", "remove")]
    for index in range(options.eyes):
        for finding, direction in arms:
            _edited(options, finding, direction, index)
        print(f"{index + 1}/{options.eyes} eyes edited", flush=True)
    folder = options.classifier or SHIPPED
    classifier = FindingsClassifier.load(folder) if folder.is_dir() else None
    rows = [_judged(options, classifier, finding, direction) for finding, direction in arms]
    result = {
        "what": options.name,
        "model": "made to know" if options.knowing else None if options.model is None else options.model.name,
        "base": str(options.base),
        "eyes": options.eyes,
        "settings": _settings(options, "FINDING", "add").model_dump(mode="json", exclude={"count", "part_size"}),
        "phase": PHASE,
        "inside": INSIDE if options.inside else None,
        "margin_of_A": MARGIN,
        "classifier": None if classifier is None else classifier.card.get("format"),
        "alignment": _alignment(options, arms),
        "device": rng.cpu_model(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    known[options.name] = result
    RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(json.dumps(result["alignment"]))
    _print(rows)


# --- making -----------------------------------------------------------------------------------------------------------


def _settings(options: argparse.Namespace, finding: str, direction: str) -> EditSettings:
    """Settings of one edit; the sentence around the word is that of the captions unless ``--plain``."""
    captions = {"cf_sentence": f"{CF_PROMPT}, with {{}}", "fa_sentence": f"{FA_PROMPT}, with {{}}"}
    around = {} if options.plain else captions
    term = {
        "text": WORDS.get(finding, finding),
        "direction": direction,
        "strength": options.strength,
        "threshold": options.threshold,
    }
    fields = {"count": 1, "edits": [term], "resolution": options.resolution, "steps": options.steps}
    return EditSettings.model_validate(fields | around)


def _phantom(options: argparse.Namespace, index: int, *findings: str) -> Phantom:
    """Eye ``index`` with these findings; the same eye without them differs in nothing else."""
    seed = rng.derive_seed(HELD_OUT, "edit", index)
    return make_phantom(seed, options.resolution, findings=frozenset(findings), phase=PHASE)


def _source(options: argparse.Namespace, finding: str, direction: str, index: int) -> Phantom:
    return _phantom(options, index, *((finding,) if direction == "remove" else ()))


def _edited(options: argparse.Namespace, finding: str, direction: str, index: int) -> Path:
    """The folder of one edit of one eye, made if it is not there."""
    folder: Path = options.work / options.name / f"{direction}-{finding}" / f"{index:03d}"
    if (folder / "seconds.json").exists():
        return folder
    settings = _settings(options, finding, direction)
    eye = _source(options, finding, direction, index)
    if options.knowing:
        healthy, ill = _phantom(options, index), _phantom(options, index, finding)
        editor = PairEditor(KnowsFinding(load_base(options.base), healthy, ill), settings)
    else:
        editor = load_editor(settings, options.model, options.base)
    area = _area(options, finding, index) if options.inside else None
    pair = SourcePair(index, f"eye {index}", eye.cf, eye.fa, area)
    begun = time.perf_counter()
    own = time.process_time()
    edit_part(editor, settings, [pair], folder, FolderContext(folder))
    spent = {"wall": round(time.perf_counter() - begun, 2), "cpu": round(time.process_time() - own, 2)}
    (folder / "seconds.json").write_text(json.dumps(spent) + "\n", encoding="utf-8")
    return folder


def _area(options: argparse.Namespace, finding: str, index: int) -> NDArray[np.bool_]:
    """Where the eye, or its twin, has the finding, and INSIDE pixels around it."""
    mask = _phantom(options, index, finding).masks[finding].astype(np.uint8)
    return np.asarray(cv2.dilate(mask, np.ones((3, 3), np.uint8), iterations=INSIDE) > 0)


class KnowsFinding(BaseAlone):
    """A model that knows one eye: without words the healthy one, with any words the one that has the finding.

    It predicts the noise that belongs to these latents. The base's UNet runs all the same, for its attention.
    """

    def __init__(self, base: Base, healthy: Phantom, ill: Phantom) -> None:
        super().__init__(base)
        self.nothing = base.encode_prompts([""])[0]
        self.alpha_bar = NoiseSchedule.from_config(base.scheduler_config).alpha_bar
        self.healthy, self.ill = ([_latent(base, eye.cf), _latent(base, _colour(eye.fa))] for eye in (healthy, ill))

    def predict_noise(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, rows: Sequence[str]
    ) -> torch.Tensor:
        """The noise that is in ``x`` if it shows that eye."""
        if len(rows) > 2:  # with an edit: its attention is asked for
            super().predict_noise(x, timesteps, text, rows)
        seen = [
            (self.healthy if torch.equal(said, self.nothing) else self.ill)[("cf", "fa").index(row)]
            for row, said in zip(rows, text, strict=True)
        ]
        alpha_bar = self.alpha_bar[int(timesteps)]
        return (x - alpha_bar.sqrt() * torch.stack(seen)) / (1 - alpha_bar).sqrt()


def _latent(base: Base, image: NDArray[np.uint8]) -> torch.Tensor:
    return base.encode_images(_tensor(image))[0][0]


# --- judging ----------------------------------------------------------------------------------------------------------


def _read(folder: Path, index: int, modality: str) -> NDArray[np.uint8]:
    image = cv2.imread(str(folder / modality / f"{index:06d}.png"), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(folder)
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _judged(
    options: argparse.Namespace, classifier: FindingsClassifier | None, finding: str, direction: str
) -> dict[str, Any]:
    """What became of one finding in one direction, over all eyes."""
    seen: dict[Modality, list[tuple[float, float]]] = {m: [] for m in MODALITIES if finding in SEEN[m]}
    entries, seconds, left, covered, moved = [], [], [], [], []
    for index in range(options.eyes):
        folder = _edited(options, finding, direction, index)
        entries.append(json.loads((folder / "part.json").read_text(encoding="utf-8"))["pairs"][0])
        seconds.append(json.loads((folder / "seconds.json").read_text(encoding="utf-8")))
        source = _source(options, finding, direction, index)
        target = _phantom(options, index, *(() if direction == "remove" else (finding,)))
        before = {"cf": source.cf, "fa": _colour(source.fa)}
        wanted = {"cf": target.cf, "fa": _colour(target.fa)}
        after = {m: _read(folder, index, m) for m in before}
        mask = _mask(folder, index)
        moved.append({m: _difference(before[m], after[m]) for m in before})
        if direction == "remove":
            lesion = source.masks[finding]
            for m in seen:
                change = _difference(before[m][lesion], wanted[m][lesion])
                if change:  # not where the finding has no pixels
                    left.append(_difference(after[m][lesion], wanted[m][lesion]) / change)
                    covered.append(float((mask[lesion] > 0).mean()))
        if classifier is not None:
            for m in seen:
                found = [float(classifier.predict(m, _tensor(image))[finding]) for image in (before[m], after[m])]
                seen[m].append((found[0], found[1]))
    eyes = [str(index) for index in range(options.eyes)]
    return {
        "finding": finding,
        "direction": direction,
        "n": options.eyes,
        "seen": {m: _rates(pairs, eyes) for m, pairs in seen.items()} if classifier is not None else None,
        "mask_share": _mean([entry["mask_share"] for entry in entries]),
        "change": {m: _mean([entry[m] for entry in moved]) for m in ("cf", "fa")},
        "spill_not_laid_on": {m: _mean([entry["spill"][m] for entry in entries]) for m in ("cf", "fa")},
        "changed_outside_mask": _outside(options, finding, direction),
        "round_trip": {m: _mean([entry["round_trip"][m] for entry in entries]) for m in ("cf", "fa")},
        "lesion_left": _mean(left) if left else None,
        "lesion_in_mask": _mean(covered) if covered else None,
        "seconds": {kind: _mean([entry[kind] for entry in seconds]) for kind in ("wall", "cpu")},
    }


def _rates(pairs: Sequence[tuple[float, float]], eyes: list[str]) -> dict[str, Any]:
    """How often the finding is seen before and after, and the mean probability, with intervals over eyes."""
    values = np.array(pairs)
    found: dict[str, Any] = {}
    for place, when in enumerate(("before", "after")):
        found[f"rate_{when}"] = float((values[:, place] >= 0.5).mean())
        found[f"probability_{when}"] = round(float(values[:, place].mean()), 4)
    found["probability_change"] = estimate(values[:, 1] - values[:, 0], eyes, label="change").to_dict()
    return found


def _outside(options: argparse.Namespace, finding: str, direction: str) -> int:
    """Largest change, in grey levels, of any pixel outside the mask; 0 by construction, and looked at all the same."""
    largest = 0
    for index in range(options.eyes):
        folder, source = _edited(options, finding, direction, index), _source(options, finding, direction, index)
        outside = _mask(folder, index) == 0
        for m, before in (("cf", source.cf), ("fa", _colour(source.fa))):
            change = np.abs(_read(folder, index, m).astype(int) - before)[outside]
            largest = max(largest, int(change.max(initial=0)))
    return largest


def _alignment(options: argparse.Namespace, arms: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """A of all edited pairs, with the same pairs before the edit as the ceiling; eyes are the unit of chance."""
    sets: dict[str, list[tuple[str, str, PairImages]]] = {"before": [], "after": []}
    for finding, direction in arms:
        for index in range(options.eyes):
            folder, source = _edited(options, finding, direction, index), _source(options, finding, direction, index)
            edited = _read(folder, index, "cf"), _read(folder, index, "fa")[..., 0]
            for when, (cf, fa) in (("before", (source.cf, source.fa)), ("after", edited)):
                images = PairImages(cf, fa, field_of_view(cf), field_of_view(fa))
                sets[when].append((f"{direction} {finding} {index}", str(index), images))
    before, after = (score_set(sets[when], seed=0) for when in ("before", "after"))
    found, refused = normalised(after, before, SCORE)
    raw = {when: scored.estimate(SCORE) for when, scored in (("before", before), ("after", after))}
    return {
        "A": None if found is None else found.to_dict(),
        "refused": refused,
        "within_margin": None if found is None else found.value >= 1 - MARGIN,
        **{when: None if score is None else score.to_dict() for when, score in raw.items()},
    }


def _mask(folder: Path, index: int) -> NDArray[np.uint8]:
    return _read(folder, index, "mask")[..., 0]


def _colour(fa: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(fa[..., None], 3, axis=2)


def _tensor(image: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def _difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return float(np.abs(a.astype(np.float32) - b.astype(np.float32)).mean()) if a.size else 0.0


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 4)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    print("| edit | N | seen before -> after | probability | mask | change CF, FA | lesion left | s (cpu) |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        seen = row["seen"] or {}
        rates = "; ".join(f"{m} {s['rate_before']:.2f} -> {s['rate_after']:.2f}" for m, s in seen.items())
        chances = "; ".join(f"{s['probability_before']:.2f} -> {s['probability_after']:.2f}" for s in seen.values())
        left = "" if row["lesion_left"] is None else f"{row['lesion_left']:.2f}"
        change = f"{row['change']['cf']:.2f}, {row['change']['fa']:.2f}"
        print(
            f"| {row['direction']} {row['finding']} | {row['n']} | {rates} | {chances} | {row['mask_share']:.0%} | "
            f"{change} | {left} | {row['seconds']['cpu']:.0f} |"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/editing"))
    parser.add_argument("--name", default="tiny", help="name of this result, and of its folder of edits")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--base", default="tiny")
    parser.add_argument("--classifier", type=Path, default=None)
    parser.add_argument("--eyes", type=int, default=6)
    parser.add_argument("--findings", nargs="+", default=list(FINDINGS), choices=FINDINGS)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--strength", type=float, default=5.0)
    parser.add_argument("--threshold", type=float, default=0.9)
    parser.add_argument("--knowing", action="store_true", help="a model made to know each lesion; strength 1 is enough")
    parser.add_argument("--inside", action="store_true", help="only around the twin's lesion; with --threshold 0")
    parser.add_argument("--plain", action="store_true", help="the word alone, without the sentence of the captions")
    return parser.parse_args()


if __name__ == "__main__":
    main()
