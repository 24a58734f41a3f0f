"""A checkpoint or a sample that somebody asks for changes no bit of what is trained, nor of other products."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cffa_core.errors import Cancelled
from cffa_core.jobs.context import FolderContext
from cffa_core.jobs.records import Wish
from cffa_core.jobs.spec import LoraSpec, SamplerSpec, TrainSettings
from cffa_core.models.base import Base
from cffa_core.recipes.train import run_training
from tests.pair_folder import write_pair_folder

STEPS = 6
APART = ("checkpoints", "latest_checkpoints")
"""What a worker does not store as products: which steps they hold is the schedule's affair."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair_folder(tmp_path_factory.mktemp("data") / "pairs", n=5)


def settings_of(**options: Any) -> TrainSettings:
    defaults: dict[str, Any] = {
        "resolution": 64,
        "steps": STEPS,
        "learning_rate": 1e-3,
        "lora": LoraSpec(rank=2),
        "holdout": 0.2,
        "validate_every": 3,
        "checkpoint_every": 4,
        "preview_every": 3,
        "preview_pairs": 1,
        "preview": SamplerSpec(steps=2),
        "seed": 7,
    }
    return TrainSettings(**(defaults | options))


class WishingContext(FolderContext):
    """A context whose owner asks for something after some steps; it keeps all checkpoints."""

    def __init__(self, out: Path, wishes: Mapping[int, frozenset[Wish]], stop_after: int | None = None) -> None:
        super().__init__(out, keep=100)
        self._wishes = dict(wishes)
        self._stop_after = stop_after
        self._step = 0

    def progress(self, stage: str, current: int, total: int) -> None:
        if stage == "training":
            if self._stop_after is not None and current > self._stop_after:
                raise Cancelled("stopped by the test")
            self._step = current

    def wishes(self) -> frozenset[Wish]:
        return self._wishes.pop(self._step, frozenset())


def products(folder: Path) -> dict[str, bytes]:
    """All files of a run that are its products."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in APART
    }


ALL: frozenset[Wish] = frozenset({"checkpoint", "sample"})
SAMPLE: frozenset[Wish] = frozenset({"sample"})
CHECKPOINT: frozenset[Wish] = frozenset({"checkpoint"})


def test_asking_changes_no_bit(base: Base, dataset: Path, tmp_path: Path) -> None:
    # With averages in the weights' place while pictures are drawn, and a sampler that draws noise at every step.
    settings = settings_of(ema_decay=0.5, batch_size=2, preview=SamplerSpec(scheduler="ddpm", steps=2))
    plain = tmp_path / "plain"
    run_training(settings, dataset, base.folder, plain, WishingContext(plain, {}))
    asked = tmp_path / "asked"
    wishes = {1: CHECKPOINT, 2: ALL, 4: SAMPLE, 5: SAMPLE, STEPS: ALL}
    run_training(settings, dataset, base.folder, asked, WishingContext(asked, wishes))
    assert products(asked) == products(plain)
    last = f"checkpoints/{STEPS:08d}/state.safetensors"
    assert (asked / last).read_bytes() == (plain / last).read_bytes(), "optimiser and averages too"
    made = {int(path.name): path for path in (asked / "checkpoints").iterdir()}
    assert sorted(made) == [1, 2, 4, 5, 6]
    assert [step for step, path in sorted(made.items()) if (path / "sample" / "sheet.png").is_file()] == [2, 4, 5, 6]


def test_a_run_goes_on_from_a_checkpoint_that_was_asked_for(base: Base, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of()
    plain = tmp_path / "plain"
    run_training(settings, dataset, base.folder, plain, WishingContext(plain, {}))
    stopped = tmp_path / "stopped"
    with pytest.raises(Cancelled):
        run_training(settings, dataset, base.folder, stopped, WishingContext(stopped, {3: ALL}, stop_after=3))
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["00000003"]
    run_training(settings, dataset, base.folder, stopped, WishingContext(stopped, {}))
    assert products(stopped) == products(plain)


def test_a_run_without_previews_draws_a_sample_all_the_same(base: Base, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of(steps=2, preview_pairs=0)
    run_training(settings, dataset, base.folder, tmp_path, WishingContext(tmp_path, {1: SAMPLE}))
    sample = tmp_path / "checkpoints" / "00000001" / "sample"
    assert len(list((sample / "cf").iterdir())) == len(list((sample / "fa").iterdir())) == 4
    assert np.asarray(Image.open(sample / "sheet.png")).std() > 0
    assert not list(tmp_path.glob("step_*"))
