"""A training on a version with a split learns from its train part alone, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import TrainSettings
from cffa_core.recipes.train import run_training
from tests.micro_base import write_micro_base
from tests.pair_folder import write_pair_folder


def test_the_test_part_changes_nothing(tmp_path: Path) -> None:
    base = write_micro_base(tmp_path / "base")
    settings = TrainSettings(
        base="micro", resolution=64, steps=3, holdout=0.5, preview_pairs=0, validate_every=3, checkpoint_every=3
    )
    logs = []
    for name in ("as it is", "other test images"):
        folder = write_pair_folder(tmp_path / name, n=6)
        split = {"train": ["pair000", "pair001"], "validation": ["pair002"], "test": ["pair003", "pair004", "pair005"]}
        index = json.loads((folder / "dataset.json").read_text())
        (folder / "dataset.json").write_text(json.dumps(index | {"split": split}))
        if logs:
            for other in split["test"]:
                for kind in ("cf", "fa"):
                    source = (folder / kind / "pair000.png").read_bytes()
                    (folder / kind / f"{other}.png").write_bytes(source)
        out = tmp_path / f"{name} run"
        run_training(settings, folder, base, out, FolderContext(out))
        logs.append((out / "training_log.jsonl").read_text())
        assert "the data set's own split counts" in (out / "validation_log.txt").read_text()
        card = json.loads((out / "best_checkpoint" / "model.json").read_text())
        assert np.isfinite(card["validation"]["loss"])
    assert logs[0] == logs[1]
