"""Training and measuring of the classifier of findings: the figures against independent ones, resuming, listing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.metrics import balanced_accuracy_score, roc_auc_score
from typer.testing import CliRunner

from cffa_core.data.phantom import FINDINGS, write_phantoms
from cffa_core.errors import InvalidSpec
from cffa_core.evaluation.findings import Modality
from cffa_core.recipes.findings import (
    FindingsConfig,
    accuracy,
    auc,
    balanced_accuracy,
    platt,
    train_findings,
    train_net,
)
from cffa_core.recipes.findings_data import Eyes, drawn_findings, training_crops
from cffa_core.recipes.pretrain_loop import Budget
from cffa_core.rng import generator
from services.client.cli import app


@pytest.fixture(scope="module")
def eyes() -> Eyes:
    """Two "eyes" of 512 px whose images are white where there are exudates (CF) or leakage (FA), and grey elsewhere."""
    cells = (np.random.default_rng(1).random((2, 4, 64, 64)) < 0.2).astype(np.uint8)
    painted = {name: 90 + 150 * np.kron(cells[:, FINDINGS.index(name)], np.ones((8, 8), np.uint8)) for name in FINDINGS}
    cf = np.repeat(painted["exudate"][..., None], 3, axis=3)
    return Eyes(cf, painted["leakage"], cells, np.ones((2, 4), np.bool_), {})


def scores(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Log-odds with ties, and a truth that goes with them."""
    rng = np.random.default_rng(seed)
    truth = rng.random(count) < 0.4
    return np.round(rng.normal(size=count) + 1.2 * truth, 1), truth


def test_figures_are_those_of_scikit_learn() -> None:
    logits, truth = scores(200, 1)
    table = np.stack([logits, truth.astype(float)], axis=1)
    assert auc(table) == pytest.approx(roc_auc_score(truth, logits))
    assert balanced_accuracy(table) == pytest.approx(balanced_accuracy_score(truth, logits >= 0))
    assert accuracy(table) == pytest.approx(((logits >= 0) == truth).mean())


def test_calibration_is_the_logistic_fit() -> None:
    strength, truth = scores(400, 2)
    strength = 3 * strength - 7
    fit = platt(strength, truth)

    def loss(weights: np.ndarray) -> float:
        scaled = weights[0] * (strength - strength.mean()) / strength.std()
        return float(np.logaddexp(0, np.where(truth, -1, 1) * (scaled + weights[1])).sum() + 0.05 * weights[0] ** 2)

    best = minimize(loss, np.zeros(2)).x
    assert fit.slope == pytest.approx(best[0] / strength.std(), rel=1e-3)
    assert fit.offset == pytest.approx(best[1] - fit.slope * strength.mean(), rel=1e-3)


def test_findings_are_drawn_independently() -> None:
    drawn = [drawn_findings(11, "train", index) for index in range(800)]
    has = np.array([[name in row for name in FINDINGS] for row in drawn], float)
    assert np.abs(has.mean(axis=0) - 0.5).max() < 0.06
    assert np.abs(np.corrcoef(has.T) - np.eye(4)).max() < 0.12


@pytest.mark.parametrize(("modality", "place"), [("cf", 1), ("fa", 2)])
def test_crops_and_their_cells_stay_together(eyes: Eyes, modality: Modality, place: int) -> None:
    images, cells = training_crops(eyes, modality, np.random.default_rng(3), generator(3), 8, 256)
    assert images.shape == (8, 3, 256, 256) and cells.shape == (8, 3, 32, 32)
    assert float(images.abs().max()) <= 1
    light = torch.nn.functional.avg_pool2d(images.mean(1), 8)
    for row in range(8):
        marked = cells[row, place] > 0
        # At 128 px a cell is two pixels and half mixed with its neighbours; a crop turned otherwise would give 0.
        assert float(light[row][marked].mean()) > float(light[row][~marked].mean()) + 0.1


def test_a_resumed_training_ends_in_the_same_weights(eyes: Eyes, tmp_path: Path) -> None:
    config = FindingsConfig(crop=64, budget=Budget(steps=4, batch=2, lr=1e-3, shards=1), every=2)

    class Stopped(Exception):
        pass

    def stop(stage: str, done: int, total: int, loss: float) -> None:
        if done == 3:
            raise Stopped

    whole, _ = train_net("fa", eyes, config, 5, tmp_path / "whole", True, lambda *_: None)
    with pytest.raises(Stopped):
        train_net("fa", eyes, config, 5, tmp_path / "cut", True, stop)
    resumed, facts = train_net("fa", eyes, config, 5, tmp_path / "cut", True, lambda *_: None)
    assert facts["steps"] == 4
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_refuses_too_few_eyes(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="at least 20 eyes"):
        train_findings(tmp_path / "out", seed=1, work=tmp_path / "work", config=FindingsConfig(train=4))


def test_the_command_lists_what_is_seen(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "pairs", 2, seed=3, resolution=128)
    ran = CliRunner().invoke(app, ["findings", str(tmp_path / "pairs"), "--json"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert [row["name"] for row in report["pairs"]] == ["p00000", "p00001"]
    assert set(report["pairs"][0]["fa"]) == {"haemorrhage", "microaneurysm", "leakage"}
    for name, count in report["seen"]["cf"].items():
        assert count == sum(row["cf"][name] >= 0.5 for row in report["pairs"])
