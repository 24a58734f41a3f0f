"""Trains and measures the classifier of findings: eyes, two networks, calibration, held-out figures, weights and card.

One resumable command: caches and checkpoints lie under ``work``, finished stages are read back. Without wall-clock caps
a resumed run ends in the same weights (same machine, same threads). Not here: networks (evaluation.findings), eyes
(findings_data).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from cffa_core import rng
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.evaluation.bootstrap import estimate
from cffa_core.evaluation.findings import (
    CARD,
    FORMAT,
    MODALITIES,
    SEEN,
    SIZES,
    Calibration,
    FindingsClassifier,
    FindingsNet,
    Modality,
    save_net,
)
from cffa_core.models.base import load_base
from cffa_core.models.checkpoint import describe_files, publish

from .findings_card import card_text
from .findings_data import CONDITIONS, Condition, Eyes, cache_eyes, decode_eyes, training_crops
from .pretrain_loop import Budget, Progress, train_stage

Numbers = npt.NDArray[np.float64]
MIN_EYES = 20
BUDGET = Budget(steps=500, batch=16, lr=2e-3, shards=1)


@dataclass(frozen=True)
class FindingsConfig:
    """Sizes and budgets. The defaults take about half an hour of one idle core; ``budget`` is that of one network."""

    train: int = 1000
    train_decoded: int = 80
    heldout: int = 320
    crop: int = 256
    budget: Budget = BUDGET
    every: int = 100
    base: str = "tiny"
    bf16: bool = True


def train_findings(
    out: Path,
    *,
    seed: int,
    work: Path,
    config: FindingsConfig | None = None,
    resume: bool = True,
    on_progress: Progress | None = None,
    models_dir: Path | None = None,
) -> dict[str, Any]:
    """Train the classifier into the folder ``out``, keeping caches and checkpoints under ``work``; returns its card.

    The first half of the held-out eyes calibrates the probabilities, the second half measures them. ``on_progress(
    stage, done, total, loss)`` is called after each eye and step. Raises ``InvalidSpec`` for too few eyes.
    """
    config, progress = config or FindingsConfig(), on_progress or (lambda *_: None)
    if min(config.train, config.heldout // 2) < MIN_EYES or config.train_decoded > config.train:
        message = f"train on at least {MIN_EYES} eyes and hold out twice as many; decode no more than there are"
        raise InvalidSpec(message, problems=(Problem("/train", "too_few_eyes", message),))
    base = load_base(config.base, models_dir=models_dir)
    train = cache_eyes(work, "train", config.train, seed, progress)
    train = decode_eyes(work, "train", train, config.train_decoded, seed, base, progress)
    heldout = cache_eyes(work, "heldout", config.heldout, seed, progress)
    heldout = decode_eyes(work, "heldout", heldout, config.heldout, seed, base, progress)
    nets: dict[Modality, FindingsNet] = {}
    trained: dict[str, Mapping[str, float]] = {}
    for modality in MODALITIES:
        nets[modality], trained[modality] = train_net(modality, train, config, seed, work, resume, progress)
    half = config.heldout // 2
    strengths = measure_strengths(nets, heldout, progress)
    calibration = calibrate(strengths, heldout, slice(0, half))
    figures = measure(strengths, calibration, heldout, slice(half, config.heldout))
    card: dict[str, Any] = {
        "format": FORMAT,
        "seed": seed,
        "base": base.name,
        "config": {**asdict(config), "budget": asdict(config.budget)},
        "trained": trained,
        "calibration": {
            m: {f: {str(s): asdict(fit) for s, fit in sides.items()} for f, sides in found.items()}
            for m, found in calibration.items()
        },
        "measured": figures,
    }
    _write(out, nets, card)
    return card


def train_net(
    modality: Modality, eyes: Eyes, config: FindingsConfig, seed: int, work: Path, resume: bool, progress: Progress
) -> tuple[FindingsNet, Mapping[str, float]]:
    """Train the network of one modality on crops, cross-entropy of every cell; ``(network, steps and seconds)``."""
    name = f"findings-{modality}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(seed, name, "weights") % 2**32)
        net = FindingsNet(len(SEEN[modality])).to(memory_format=torch.channels_last)

    def loss(step: int, shard: int) -> torch.Tensor:
        numbers = np.random.default_rng(rng.derive_seed(seed, name, step, shard))
        draws = rng.generator(seed, name, step, shard)
        images, cells = training_crops(eyes, modality, numbers, draws, config.budget.per_shard, config.crop)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
            places = net(images.contiguous(memory_format=torch.channels_last))
        return F.binary_cross_entropy_with_logits(places.float(), cells)

    facts = train_stage(
        name, work, {"net": net}, loss, config.budget, resume=resume, every=config.every, ema=None, progress=progress
    )
    with torch.no_grad():  # what is measured is what is stored
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())
    return net.eval(), facts


def measure_strengths(
    nets: Mapping[Modality, FindingsNet], eyes: Eyes, progress: Progress
) -> dict[tuple[Modality, Condition], Numbers]:
    """Strength of each finding in each eye under each condition, (N, 3)."""
    found = {}
    for modality in MODALITIES:
        classifier = FindingsClassifier(nets, {}, {})
        for condition in CONDITIONS:
            rows = []
            for row in range(len(eyes)):
                rows.append(classifier.strength(modality, eyes.images(modality, [row], condition)))
                progress(f"measuring-{modality}-{condition[0]}", row + 1, len(eyes), 0.0)
            found[modality, condition] = torch.cat(rows).double().numpy()
    return found


def calibrate(
    strengths: Mapping[tuple[Modality, Condition], Numbers], eyes: Eyes, rows: slice
) -> dict[Modality, dict[str, dict[int, Calibration]]]:
    """Platt's fit per modality, finding and side, over plain and decoded images of the eyes ``rows`` alike."""
    fits: dict[Modality, dict[str, dict[int, Calibration]]] = {}
    for modality in MODALITIES:
        labels = eyes.labels(modality)[rows]
        fits[modality] = {}
        for place, finding in enumerate(SEEN[modality]):
            fits[modality][finding] = {}
            for side in SIZES:
                both = [strengths[modality, (side, vae)][rows, place] for vae in (False, True)]
                truth = np.concatenate([labels[:, place]] * 2)
                fits[modality][finding][side] = platt(np.concatenate(both), truth)
    return fits


def platt(strength: Numbers, truth: npt.NDArray[np.bool_]) -> Calibration:
    """Logistic regression of ``truth`` on ``strength`` by Newton's method, with a little ridge (Platt 1999)."""
    centre, spread = float(strength.mean()), float(strength.std()) or 1.0
    features = np.stack([(strength - centre) / spread, np.ones_like(strength)], axis=1)
    weights = np.zeros(2)
    ridge = np.diag([0.1, 0.0])
    for _ in range(50):
        guess = 1 / (1 + np.exp(-features @ weights))
        slope = features.T @ (guess - truth) + ridge @ weights
        curve = (features * (guess * (1 - guess))[:, None]).T @ features + ridge + 1e-9 * np.eye(2)
        weights -= np.linalg.solve(curve, slope)
    return Calibration(float(weights[0] / spread), float(weights[1] - weights[0] * centre / spread))


def measure(
    strengths: Mapping[tuple[Modality, Condition], Numbers],
    calibration: Mapping[Modality, Mapping[str, Mapping[int, Calibration]]],
    eyes: Eyes,
    rows: slice,
) -> list[dict[str, Any]]:
    """A row per modality, finding and condition: accuracy, balanced accuracy and AUC with 95 % intervals over eyes."""
    report = []
    for (modality, (side, vae)), strength in strengths.items():
        for place, finding in enumerate(SEEN[modality]):
            fit = calibration[modality][finding][side]
            truth = eyes.labels(modality)[rows, place]
            logits = fit.slope * strength[rows, place] + fit.offset
            table = np.stack([logits, truth.astype(np.float64)], axis=1)
            names = [f"eye {index}" for index in range(len(table))]
            scores: dict[str, Callable[[Numbers], float]] = {
                "accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "auc": auc,
            }  # fmt: skip
            label = f"{modality}-{finding}-{side}-{vae}"
            entry = {name: estimate(table, names, score, label=label).to_dict() for name, score in scores.items()}
            report.append({"modality": modality, "finding": finding, "side": side, "decoded": vae, **entry})
    return report


def accuracy(table: Numbers) -> float:
    """Share of right answers; ``table`` (N, 2) holds log-odds and truth."""
    return float(((table[:, 0] >= 0) == (table[:, 1] > 0)).mean())


def balanced_accuracy(table: Numbers) -> float:
    """Mean of sensitivity and specificity."""
    right, ill = (table[:, 0] >= 0) == (table[:, 1] > 0), table[:, 1] > 0
    return float((right[ill].mean() + right[~ill].mean()) / 2) if ill.any() and not ill.all() else float(right.mean())


def auc(table: Numbers) -> float:
    """Area under the ROC curve: how often an eye with the finding is above one without; ties count half."""
    ill, well = table[table[:, 1] > 0, 0], table[table[:, 1] == 0, 0]
    if not len(ill) or not len(well):
        return 0.5
    above = (ill[:, None] > well[None]).mean() + 0.5 * (ill[:, None] == well[None]).mean()
    return float(above)


def _write(out: Path, nets: Mapping[Modality, FindingsNet], card: dict[str, Any]) -> None:
    with publish(out) as folder:
        for modality, net in nets.items():
            save_net(folder / f"{modality}.safetensors", net)
        (folder / "README.md").write_text(card_text(card), encoding="utf-8")
        card["files"] = describe_files(folder)
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
