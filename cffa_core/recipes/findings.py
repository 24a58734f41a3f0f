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
    SIDE,
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
Truth = npt.NDArray[np.bool_]
Strengths = dict[Condition, Numbers]  # (N, 3) of the first N eyes
MIN_EYES = 20
BUDGET = Budget(steps=280, batch=8, lr=2e-3, shards=1)


@dataclass(frozen=True)
class FindingsConfig:
    """Sizes and budgets. The defaults take about half an hour of one idle core; ``budget`` is that of one network.

    ``train_decoded`` of the eyes are seen through the VAE as well; at sides below 512 ``heldout_small`` are measured.
    """

    train: int = 1000
    train_decoded: int = 80
    heldout: int = 320
    heldout_small: int = 160
    crop: int = 256
    budget: Budget = BUDGET
    every: int = 100
    base: str = "tiny"
    bf16: bool = True

    @property
    def counts(self) -> dict[int, int]:
        """Held-out eyes per side."""
        return {side: self.heldout if side == SIDE else self.heldout_small for side in SIZES}


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

    Held-out eyes calibrate and measure the probabilities: what is said of one half was calibrated on the other, what is
    written is calibrated on all. ``on_progress(stage, done, total, loss)`` is called after each eye and step. Raises
    ``InvalidSpec`` for too few eyes.
    """
    config, progress = config or FindingsConfig(), on_progress or (lambda *_: None)
    fewest = min(config.train, config.heldout_small)
    if fewest < MIN_EYES or config.train_decoded > config.train or config.heldout_small > config.heldout:
        message = f"train and measure on at least {MIN_EYES} eyes, and decode no more than there are"
        raise InvalidSpec(message, problems=(Problem("/train", "too_few_eyes", message),))
    base = load_base(config.base, models_dir=models_dir)
    train = cache_eyes(work, "train", config.train, seed, progress)
    train = decode_eyes(work, "train", train, dict.fromkeys(SIZES, config.train_decoded), seed, base, progress)
    heldout = cache_eyes(work, "heldout", config.heldout, seed, progress)
    heldout = decode_eyes(work, "heldout", heldout, config.counts, seed, base, progress)
    nets: dict[Modality, FindingsNet] = {}
    trained: dict[str, Mapping[str, float]] = {}
    for modality in MODALITIES:
        nets[modality], trained[modality] = train_net(modality, train, config, seed, work, resume, progress)
    strengths = {m: measure_strengths(m, nets, heldout, config.counts, progress) for m in MODALITIES}
    facts = {"seed": seed, "base": base.name, "trained": trained, "config": asdict(config)}
    return write_classifier(out, nets, strengths, heldout, facts)


def train_net(
    modality: Modality, eyes: Eyes, config: FindingsConfig, seed: int, work: Path, resume: bool, progress: Progress
) -> tuple[FindingsNet, Mapping[str, float]]:
    """Train the network of one modality on crops, cross-entropy of every cell; ``(network, steps and seconds)``."""
    name = f"findings-{modality}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.derive_seed(seed, name, "weights") % 2**32)
        net = FindingsNet(len(SEEN[modality]))
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

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
    modality: Modality, nets: Mapping[Modality, FindingsNet], eyes: Eyes, counts: Mapping[int, int], progress: Progress
) -> Strengths:
    """Strength of each finding in the first ``counts[side]`` eyes under each condition, (N, 3)."""
    classifier = FindingsClassifier(nets, {}, {})
    found = {}
    for side, vae in CONDITIONS:
        rows = []
        for row in range(counts[side]):
            rows.append(classifier.strength(modality, eyes.images(modality, [row], (side, vae))))
            progress(f"measuring-{modality}-{side}", row + 1, counts[side], 0.0)
        found[side, vae] = torch.cat(rows).double().numpy()
    return found


def write_classifier(
    out: Path,
    nets: Mapping[Modality, FindingsNet],
    strengths: Mapping[Modality, Strengths],
    eyes: Eyes,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Calibrate and measure on the strengths of the held-out ``eyes``, then write weights, card and README."""
    calibration: dict[str, dict[str, dict[str, Any]]] = {}
    measured = []
    for modality in MODALITIES:
        calibration[modality] = {}
        for place, finding in enumerate(SEEN[modality]):
            truth = eyes.labels(modality)[:, place]
            calibration[modality][finding] = {}
            for side in SIZES:
                plain, decoded = (strengths[modality][side, vae][:, place] for vae in (False, True))
                fit, rows = calibrated(plain, decoded, truth[: len(plain)])
                calibration[modality][finding][str(side)] = asdict(fit)
                for vae, logits in zip((False, True), rows, strict=True):
                    label = f"{modality}-{finding}-{side}-{vae}"
                    entry = measured_row(logits, truth[: len(logits)], label)
                    measured.append({"modality": modality, "finding": finding, "side": side, "decoded": vae, **entry})
    card = {"format": FORMAT, **facts, "calibration": calibration, "measured": measured}
    _write(out, nets, card)
    return card


def calibrated(plain: Numbers, decoded: Numbers, truth: Truth) -> tuple[Calibration, tuple[Numbers, Numbers]]:
    """Platt's fit over plain and decoded images, and the log-odds of both by a fit on the other half of the eyes."""
    halves = np.arange(len(truth)) % 2 == 0
    both, twice = np.concatenate([plain, decoded]), np.concatenate([truth, truth])
    logits = np.zeros_like(both)
    for half in (halves, ~halves):
        here = np.concatenate([half, half])
        fit = platt(both[~here], twice[~here])
        logits[here] = fit.slope * both[here] + fit.offset
    return platt(both, twice), (logits[: len(plain)], logits[len(plain) :])


def platt(strength: Numbers, truth: Truth) -> Calibration:
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


def measured_row(logits: Numbers, truth: Truth, label: str) -> dict[str, Any]:
    """Accuracy, balanced accuracy and AUC with 95 % bootstrap intervals over eyes."""
    table = np.stack([logits, truth.astype(np.float64)], axis=1)
    names = [f"eye {index}" for index in range(len(table))]
    scores: dict[str, Callable[[Numbers], float]] = {
        "accuracy": accuracy, "balanced_accuracy": balanced_accuracy, "auc": auc,
    }  # fmt: skip
    return {name: estimate(table, names, score, label=label).to_dict() for name, score in scores.items()}


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
