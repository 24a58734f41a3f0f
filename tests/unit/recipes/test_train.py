"""The training recipe: what a run leaves, and that stopping and resuming it changes no byte."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cffa_core.errors import Cancelled, Conflict, CorruptArtifact, TrainingDiverged
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import read_card
from cffa_core.models.base import Base
from cffa_core.recipes.train import run_training
from cffa_core.recipes.training_phases import learning_rate
from tests.pair_folder import write_pair_folder

CHECKPOINTS = "checkpoints"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("data") / "pairs", n=5)


def settings_of(**options: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "resolution": 64,
        "steps": 6,
        "learning_rate": 1e-3,
        "lora": LoraSpec(rank=2),
        "holdout": 0.2,
        "validate_every": 2,
        "checkpoint_every": 2,
        "preview_every": 3,
        "preview_pairs": 2,
        "preview": SamplerSpec(steps=2),
        "seed": 7,
    }
    return TrainSettings(**(defaults | options))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without the context's own checkpoints."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != CHECKPOINTS
    }


class StoppingContext(FolderContext):
    """A context whose job is cancelled at a moment that ``when(stage, current)`` names."""

    def __init__(self, out: Path, when: Callable[[str, int], bool]) -> None:
        super().__init__(out)
        self._when = when

    def progress(self, stage: str, current: int, total: int) -> None:
        if self._when(stage, current):
            raise Cancelled("stopped by the test")


@pytest.fixture(scope="module")
def run(base: Base, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_training(settings_of(), dataset, base.folder, out, FolderContext(out))
    return out


def test_what_a_run_leaves(run: Path, base: Base) -> None:
    names = {path.name for path in run.iterdir()} - {CHECKPOINTS}
    logs = {f"{name}_log.{kind}" for name in ("training", "validation") for kind in ("txt", "jsonl")}
    previews = {"step_000003_random_pairs", "step_000006_random_pairs"}
    assert names == logs | previews | {"best_checkpoint", "latest_checkpoints", "novelty.safetensors"}
    assert not list((run / "best_checkpoint").glob("novelty*")), "the model travels, pictures of patients do not"
    assert sorted(p.name for p in (run / "latest_checkpoints").iterdir()) == [f"step_{s:06d}" for s in (2, 4, 6)]
    for folder in (run / "best_checkpoint", *(run / "latest_checkpoints").iterdir()):
        DualUnet.load(folder, base)


def test_the_logs_say_the_same_twice(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]) == {
        "step", "loss", "eps_cf", "eps_fa", "hf_cf", "hf_fa", "struct", "lr", "grad_norm"
    }  # fmt: skip
    text = (run / "training_log.txt").read_text().splitlines()
    assert len(text) == 6 and f"loss {lines[0]['loss']:.6g}" in text[0]
    validation = [json.loads(line) for line in (run / "validation_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in validation] == [2, 4, 6]
    assert {"loss_t200", "loss_t500", "loss_t800"} <= set(validation[0])
    mean = sum(validation[0][f"loss_t{t}"] for t in (200, 500, 800)) / 3
    assert validation[0]["loss"] == pytest.approx(mean)


def test_best_is_the_best_validation(run: Path) -> None:
    validation = [json.loads(line) for line in (run / "validation_log.jsonl").read_text().splitlines()]
    best = min(validation, key=lambda line: line["loss"])
    card = read_card(run / "best_checkpoint")
    assert card["step"] == best["step"] and card["validation"] == best


def test_previews_are_pictures_of_pairs(run: Path) -> None:
    folder = run / "step_000003_random_pairs"
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == [
        "cf/000000.png", "cf/000001.png", "fa/000000.png", "fa/000001.png", "sheet.png"
    ]  # fmt: skip
    with Image.open(folder / "cf/000000.png") as cf, Image.open(folder / "fa/000000.png") as fa:
        assert (cf.size, cf.mode, fa.size, fa.mode) == ((64, 64), "RGB", (64, 64), "L")


def test_the_same_run_again_has_the_same_bytes(run: Path, base: Base, dataset: Path, tmp_path: Path) -> None:
    run_training(settings_of(), dataset, base.folder, tmp_path, FolderContext(tmp_path))
    assert contents(tmp_path) == contents(run)


def test_another_seed_has_other_bytes(run: Path, base: Base, dataset: Path, tmp_path: Path) -> None:
    run_training(settings_of(seed=8), dataset, base.folder, tmp_path, FolderContext(tmp_path))
    assert contents(tmp_path)["training_log.jsonl"] != contents(run)["training_log.jsonl"]


STOPS: dict[str, Callable[[str, int], bool]] = {
    "before the first checkpoint": lambda stage, current: (stage, current) == ("training", 2),
    "just after a checkpoint": lambda stage, current: (stage, current) == ("training", 3),
    "after steps that must be cut back": lambda stage, current: (stage, current) == ("training", 4),
    "in the last validation": lambda stage, current: stage == "validation" and current == 3,
    "in a preview": lambda stage, current: stage == "preview",
}


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(
    run: Path, base: Base, dataset: Path, tmp_path: Path, stop: str
) -> None:
    settings = settings_of()
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, tmp_path, StoppingContext(tmp_path, STOPS[stop]))
    run_training(settings, dataset, base.folder, tmp_path, FolderContext(tmp_path))
    assert contents(tmp_path) == contents(run)


def test_resume_on_another_machine_with_everything_on(base: Base, dataset: Path, tmp_path: Path) -> None:
    """EMA, accumulation, batches, augmentation and colour, into an empty folder with the checkpoint alone."""
    settings = settings_of(
        ema_decay=0.9, gradient_accumulation=2, batch_size=2, colour_variants=2, gradient_checkpointing=True
    )
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    run_training(settings, dataset, base.folder, whole, FolderContext(whole))
    stop = StoppingContext(first, lambda stage, current: (stage, current) == ("training", 5))
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, first, stop)
    shutil.copytree(first / CHECKPOINTS, second / CHECKPOINTS)
    run_training(settings, dataset, base.folder, second, FolderContext(second))
    assert contents(second) == contents(whole)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resume_in_half_precision(base: Base, dataset: Path, tmp_path: Path, precision: str) -> None:
    settings = settings_of(precision=precision, steps=4, validate_every=4, preview_pairs=0)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_training(settings, dataset, base.folder, whole, FolderContext(whole))
    stop = StoppingContext(stopped, lambda stage, current: (stage, current) == ("training", 3))
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, stopped, stop)
    run_training(settings, dataset, base.folder, stopped, FolderContext(stopped))
    assert contents(stopped) == contents(whole)


def test_a_finished_run_is_not_run_again(base: Base, dataset: Path, run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    context = FolderContext(out)
    card = run_training(settings_of(), dataset, base.folder, out, context)
    assert context.logged == [] and card == read_card(run / "best_checkpoint")
    assert contents(out) == contents(run)


def test_another_run_s_checkpoint_is_refused(base: Base, dataset: Path, run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    with pytest.raises(Conflict, match="settings differ"):
        run_training(settings_of(steps=8), dataset, base.folder, out, FolderContext(out))
    other = write_pair_folder(tmp_path / "other", n=4, seed=1)
    with pytest.raises(Conflict, match="dataset differ"):
        run_training(settings_of(), other, base.folder, out, FolderContext(out))
    assert contents(out) == contents(run)


def test_a_damaged_checkpoint_is_refused(base: Base, dataset: Path, run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    (out / CHECKPOINTS / "00000006" / "training_log.txt").write_text("step 1 all is well\n")
    with pytest.raises(CorruptArtifact, match="training_log"):
        run_training(settings_of(), dataset, base.folder, out, FolderContext(out))


@pytest.mark.parametrize("options", [{"holdout": 0.0}, {"holdout": 0.5}])
def test_with_no_eye_held_out_the_latest_is_the_best(base: Base, tmp_path: Path, options: dict[str, Any]) -> None:
    eyes = None if options["holdout"] == 0 else 1
    dataset = write_pair_folder(tmp_path / "data", n=3, eyes=eyes)
    out = tmp_path / "out"
    card = run_training(settings_of(preview_pairs=0, steps=3, **options), dataset, base.folder, out, FolderContext(out))
    assert (card["step"], card["validation"]) == (3, None)
    assert "best model is the latest" in (out / "validation_log.txt").read_text()
    latest = out / "latest_checkpoints/step_000003"
    assert (out / "best_checkpoint/lora_fa.safetensors").read_bytes() == (latest / "lora_fa.safetensors").read_bytes()


def test_held_out_eyes_are_not_trained_on(base: Base, dataset: Path, run: Path, tmp_path: Path) -> None:
    """Spoiling the held-out pair's image changes the validation log and nothing that was trained."""
    from cffa_core.data.pairs import load_pairs

    _, held = load_pairs(dataset, 64).split_by_eye(0.2, 7)
    spoiled = shutil.copytree(dataset, tmp_path / "spoiled")
    for pair in held:
        Image.new("RGB", (64, 64), (9, 9, 90)).save(spoiled / f"cf/{pair.name}.png")
    out = tmp_path / "out"
    run_training(settings_of(), spoiled, base.folder, out, FolderContext(out))
    assert contents(out)["training_log.jsonl"] == contents(run)["training_log.jsonl"]
    assert contents(out)["validation_log.jsonl"] != contents(run)["validation_log.jsonl"]


def test_one_modality_trains_and_previews_alone(base: Base, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of(modalities=("fa",), steps=2, preview_every=2)
    card = run_training(settings, dataset, base.folder, tmp_path, FolderContext(tmp_path))
    assert card["noise_rotation"] is None and list(card["parameters"]) == ["fa"]
    assert not (tmp_path / "step_000002_random_pairs/cf").exists()


def test_ema_is_what_is_saved(base: Base, dataset: Path, tmp_path: Path) -> None:
    """With a decay near 1 the average stays near the start, where B is zero."""
    sizes = {}
    for decay in (0.0, 0.999):
        out = tmp_path / str(decay)
        run_training(settings_of(ema_decay=decay, preview_pairs=0), dataset, base.folder, out, FolderContext(out))
        model = DualUnet.load(out / "latest_checkpoints/step_000006", base)
        sizes[decay] = sum(p.abs().sum().item() for n, p in model.lora.named_parameters() if "lora_B" in n)
    assert 0 < sizes[0.999] < 0.02 * sizes[0.0]


def test_a_loss_that_is_no_number_stops_the_run(base: Base, dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match="smaller learning_rate"):
        run_training(
            settings_of(learning_rate=1.0, weight_decay=1e30, max_grad_norm=1e30, steps=30, preview_pairs=0),
            dataset,
            base.folder,
            tmp_path,
            FolderContext(tmp_path),
        )


def test_large_data_gives_a_rotation(base: Base, tmp_path: Path) -> None:
    dataset = write_pair_folder(tmp_path / "data", n=3, size=128)
    settings = settings_of(
        resolution=128, steps=1, preview_pairs=1, preview=SamplerSpec(steps=1, initial_noise="rotated")
    )
    card = run_training(settings, dataset, base.folder, tmp_path / "out", FolderContext(tmp_path / "out"))
    rotation = card["noise_rotation"]
    identity = [[sum(a * b for a, b in zip(r, s, strict=True)) for s in rotation] for r in rotation]
    assert identity == [[pytest.approx(float(i == j), abs=5e-6) for j in range(4)] for i in range(4)]
    bands = np.array(card["band_rotations"])
    assert bands.shape == (6, 4, 4) and card["default_noise"] == "banded"
    np.testing.assert_allclose(bands @ bands.transpose(0, 2, 1), np.stack([np.eye(4)] * 6), atol=5e-6)


def test_learning_rate() -> None:
    rates = [learning_rate(done, 100, 5e-5) for done in range(101)]
    assert rates[:51] == [5e-5] * 51
    assert rates[75] == pytest.approx(2.5e-5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[50:]))
    assert learning_rate(0, 1, 1.0) == 1.0
    assert math.isclose(learning_rate(60, 100, 1.0), 0.5 * (1 + math.cos(math.pi * 0.2)))
