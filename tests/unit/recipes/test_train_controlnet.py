"""Training a conditional model: ControlNets go into checkpoints with the LoRAs, and previews have structures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cffa_core.data.phantom import write_phantoms
from cffa_core.errors import Cancelled, InvalidDataset
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.controlnet import ControlNet
from cffa_core.models.base import Base
from cffa_core.recipes.train import run_training
from tests.pair_folder import write_pair_folder


def settings_of(**options: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "method": "controlnet",
        "resolution": 64,
        "steps": 4,
        "learning_rate": 1e-2,
        "lora": LoraSpec(rank=2),
        "holdout": 0.3,
        "validate_every": 2,
        "checkpoint_every": 2,
        "preview_every": 2,
        "preview_pairs": 3,
        "preview": SamplerSpec(steps=2),
        "seed": 7,
    }
    return TrainSettings(**(defaults | options))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without the context's own checkpoints."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith("checkpoints/")}


class Stops(FolderContext):
    """Its job is cancelled after three steps."""

    def progress(self, stage: str, current: int, total: int) -> None:
        if (stage, current) == ("training", 3):
            raise Cancelled("stopped by the test")


def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(base: Base, tmp_path: Path) -> None:
    """On another machine: the second half starts from the checkpoint alone."""
    dataset = write_pair_folder(tmp_path / "pairs", n=4)
    settings = settings_of(ema_decay=0.5, batch_size=2)
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    run_training(settings, dataset, base.folder, whole, FolderContext(whole))
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, first, Stops(first))
    shutil.copytree(first / "checkpoints", second / "checkpoints")
    card = run_training(settings, dataset, base.folder, second, FolderContext(second))
    assert contents(second) == contents(whole)
    assert set(card["parameters"]) == {"cf", "fa", "controlnet_vessels", "controlnet_tile"}
    names = contents(whole)
    assert "best_checkpoint/controlnet_tile.safetensors" in names
    assert len([name for name in names if name.startswith("step_000002_random_pairs/cf/")]) == 3
    trained = ControlNet.load(whole / "latest_checkpoints/step_000004", base)
    fresh = ControlNet(base, settings)
    for (name, now), (_, before) in zip(trained.named_parameters(), fresh.named_parameters(), strict=True):
        moved = not torch.equal(now, before)
        assert moved or "lora_" in name, f"{name} did not learn"


def test_on_masks_and_without_held_out_eyes(base: Base, tmp_path: Path) -> None:
    write_phantoms(tmp_path / "eyes", 2, seed=1, resolution=64, processes=1)
    settings = settings_of(steps=2, holdout=0.0, controlnet={"vessels": "masks", "tile": False})
    card = run_training(settings, tmp_path / "eyes", base.folder, tmp_path / "out", FolderContext(tmp_path / "out"))
    assert card["settings"]["controlnet"]["vessels"] == "masks"
    assert "controlnet_tile" not in card["parameters"]
    log = (tmp_path / "out/training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]
    bare = write_pair_folder(tmp_path / "bare", n=2)
    with pytest.raises(InvalidDataset, match="has no vessel mask"):
        run_training(settings, bare, base.folder, tmp_path / "no", FolderContext(tmp_path / "no"))
