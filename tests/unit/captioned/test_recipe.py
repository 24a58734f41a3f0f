"""The recipes of the captioned model: what they leave, resume bit for bit, and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cffa_core.captioned.model_folder import load_captioned, read_captioned_card
from cffa_core.data.captions import read_captions
from cffa_core.errors import (
    Cancelled,
    Conflict,
    CorruptArtifact,
    InvalidDataset,
    InvalidSpec,
    ModelUnavailable,
    NotEnoughData,
    TrainingDiverged,
)
from cffa_core.jobs.captioned_spec import CaptionedSettings, CaptionedSizes, CaptionedTrainSettings
from cffa_core.jobs.context import FolderContext
from cffa_core.methods.method import read_card
from cffa_core.recipes.captioned import run_captioned, run_captioned_training

CONTEXT = "context"
TEXT = "A high quality color fundus photograph, retinal structure"


def settings_of(sizes: CaptionedSizes, **options: Any) -> CaptionedTrainSettings:
    defaults: dict[str, Any] = {
        "sizes": sizes,
        "steps": 4,
        "batch_size": 3,
        "learning_rate": 1e-2,
        "holdout": 0.3,
        "validate_every": 2,
        "checkpoint_every": 2,
        "seed": 7,
    }
    return CaptionedTrainSettings(**(defaults | options))


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run, without the context's own checkpoints."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != CONTEXT
    }


def ignore(stage: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


class Stopping(FolderContext):
    """A context whose job is cancelled after a step."""

    def __init__(self, out: Path, after: int) -> None:
        super().__init__(out)
        self._after = after

    def progress(self, stage: str, current: int, total: int) -> None:
        if (stage, current) == ("training", self._after):
            raise Cancelled("stopped by the test")


@pytest.fixture(scope="module")
def run(sizes: CaptionedSizes, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run."""
    out = tmp_path_factory.mktemp("run") / "out"
    run_captioned_training(settings_of(sizes), dataset, out, FolderContext(out / CONTEXT))
    return out


@pytest.fixture(scope="module")
def trained(run: Path) -> Path:
    return run / "best_checkpoint"


def test_what_a_training_leaves(run: Path, trained: Path, sizes: CaptionedSizes) -> None:
    names = {path.name for path in run.iterdir()} - {CONTEXT}
    logs = {f"{name}_log.{kind}" for name in ("training", "validation") for kind in ("txt", "jsonl")}
    assert names == {"best_checkpoint", *logs}
    assert {path.name for path in trained.iterdir()} == {"model.json", "tokenizer.json", "model.safetensors"}
    lines = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    terms = {"contrastive", "pull", "reconstruction", "caption", "diffusion"}
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]) == {"step", "loss", "lr", "grad_norm", *terms}
    validation = [json.loads(line) for line in (run / "validation_log.jsonl").read_text().splitlines()]
    assert set(validation[0]) == {"step", "loss", "text_to_image", "image_to_text", *terms}
    card = read_captioned_card(trained)
    assert (card["family"], card["modality"], card["settings"]["sizes"]) == (
        "captioned",
        "cf",
        sizes.model_dump(mode="json"),
    )
    assert card["validation"] == min(validation, key=lambda line: line["loss"])
    assert len(card["dataset_digest"]) == len(card["captions_digest"]) == 64


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_stopped_and_resumed_run_ends_with_the_same_bytes(
    run: Path, sizes: CaptionedSizes, dataset: Path, tmp_path: Path, stop: int
) -> None:
    """Before the first checkpoint; after steps that are cut back; at the last step, elsewhere."""
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(Cancelled):
        run_captioned_training(settings_of(sizes), dataset, first, Stopping(first / CONTEXT, stop))
    if (first / CONTEXT).exists():
        shutil.copytree(first / CONTEXT, second / CONTEXT)
    run_captioned_training(settings_of(sizes), dataset, second, FolderContext(second / CONTEXT))
    assert contents(second) == contents(run)


def test_resume_in_half_precision(sizes: CaptionedSizes, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of(sizes, precision="bf16", modality="fa", augment="none", drawn_per_step=2, steps=3)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_captioned_training(settings, dataset, whole, FolderContext(whole / CONTEXT))
    with pytest.raises(Cancelled):
        run_captioned_training(settings, dataset, stopped, Stopping(stopped / CONTEXT, 3))
    run_captioned_training(settings, dataset, stopped, FolderContext(stopped / CONTEXT))
    assert contents(stopped) == contents(whole)


def test_another_run_s_checkpoint_is_refused(run: Path, sizes: CaptionedSizes, dataset: Path, tmp_path: Path) -> None:
    out = shutil.copytree(run, tmp_path / "out")
    with pytest.raises(Conflict, match="settings differ"):
        run_captioned_training(settings_of(sizes, steps=9), dataset, out, FolderContext(out / CONTEXT))
    other = shutil.copytree(dataset, tmp_path / "other")
    text = (other / "captions.jsonl").read_text()
    (other / "captions.jsonl").write_text(text.replace("retinal structure", "retinal picture", 1))
    with pytest.raises(Conflict, match=r"captions differ\)"):
        run_captioned_training(settings_of(sizes), other, out, FolderContext(out / CONTEXT))
    assert contents(out) == contents(run)


def test_without_held_out_eyes_the_latest_is_the_best(sizes: CaptionedSizes, dataset: Path, tmp_path: Path) -> None:
    settings = settings_of(sizes, holdout=0.0, steps=2)
    card = run_captioned_training(settings, dataset, tmp_path, FolderContext(tmp_path / CONTEXT))
    assert (card["step"], card["validation"]) == (2, None)


def test_bad_captions_are_refused(sizes: CaptionedSizes, dataset: Path, tmp_path: Path) -> None:
    data = shutil.copytree(dataset, tmp_path / "data")
    captions = data / "captions.jsonl"
    lines = captions.read_text().splitlines()
    out = tmp_path / "out"

    def train(**options: Any) -> None:
        run_captioned_training(settings_of(**{"sizes": sizes} | options), data, out, FolderContext(out / CONTEXT))

    with pytest.raises(InvalidDataset, match="7 caption"):
        train(sizes=sizes.model_copy(update={"max_tokens": 6}))
    captions.write_text(lines[0] + "\n")
    with pytest.raises(NotEnoughData, match=r"captions\.jsonl"):
        train(holdout=0.0)
    captions.write_text(lines[0] + "\nno line\n")
    with pytest.raises(InvalidDataset, match=r"captions\.jsonl:2"):
        train()
    assert not (out / "best_checkpoint").exists()


def test_a_loss_that_is_no_number_stops_the_run(sizes: CaptionedSizes, dataset: Path, tmp_path: Path) -> None:
    wild = settings_of(sizes, learning_rate=1.0, weight_decay=1e38, max_grad_norm=1e30, steps=50, validate_every=50)
    with pytest.raises(TrainingDiverged, match="smaller learning_rate"):
        run_captioned_training(wild, dataset, tmp_path, FolderContext(tmp_path / CONTEXT))


def test_families_refuse_each_other(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match="not a cffa-model/1"):
        read_card(trained)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    (pairs / "model.json").write_text(json.dumps({"format": "cffa-model/1", "method": "dual_unet"}))
    with pytest.raises(ModelUnavailable, match=r"family captioned .* method dual_unet"):
        load_captioned(pairs)
    with pytest.raises(ModelUnavailable, match=r"no model\.json"):
        load_captioned(tmp_path)


def test_damaged_weights_are_refused(trained: Path, tmp_path: Path) -> None:
    model = shutil.copytree(trained, tmp_path / "model")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(CorruptArtifact, match=r"model\.safetensors"):
        load_captioned(model)


def drawn(trained: Path, out: Path, texts: tuple[str, ...] = (TEXT,), **options: Any) -> dict[str, Any]:
    settings = CaptionedSettings(task="text_to_image", texts=texts, ddim_steps=10, **options)
    return run_captioned(settings, trained, None, out, ignore)


def pixels(out: Path, index: int) -> np.ndarray[Any, Any]:
    with Image.open(out / f"images/{index:06d}.png") as picture:
        return np.asarray(picture)


def test_texts_become_pictures(trained: Path, tmp_path: Path) -> None:
    report = drawn(trained, tmp_path, images_per_text=3)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert report["pictures"] == 3 and "DDIM" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "sheet.png").is_file()
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2] and {line["text"] for line in lines} == {TEXT}
    with Image.open(tmp_path / lines[0]["image"]["name"]) as picture:
        assert (picture.size, picture.mode, picture.text["Synthetic Data"]) == ((224, 224), "RGB", "YES")
    first, second = (pixels(tmp_path, index) for index in (0, 1))
    assert not np.array_equal(first, second), "each has noise of its own"


def test_a_picture_does_not_depend_on_its_neighbours(trained: Path, tmp_path: Path) -> None:
    few, many = tmp_path / "few", tmp_path / "many"
    drawn(trained, few, images_per_text=2)
    drawn(trained, many, images_per_text=9)
    for index in (0, 1):
        name = f"images/{index:06d}.png"
        assert (few / name).read_bytes() == (many / name).read_bytes()


def test_directly_drawn_pictures_have_no_noise(trained: Path, tmp_path: Path) -> None:
    drawn(trained, tmp_path, images_per_text=2, use_diffusion=False)
    np.testing.assert_array_equal(pixels(tmp_path, 0), pixels(tmp_path, 1))


def test_texts_that_cannot_be_read_are_refused_at_once(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="never read 'cataract'") as found:
        drawn(trained, tmp_path, (TEXT, f"{TEXT}, with cataract", f"{TEXT} " * 4))
    assert [problem.code for problem in found.value.problems] == ["unknown_words", "text_too_long"]
    assert not (tmp_path / "images").exists()


def test_pictures_get_captions(trained: Path, dataset: Path, tmp_path: Path) -> None:
    settings = CaptionedSettings(task="image_to_text", captions=2, max_images=3)
    report = run_captioned(settings, trained, dataset, tmp_path, ignore)
    captions = read_captions(tmp_path)
    assert list(captions) == ["p00000", "p00001", "p00002"] and report["pictures"] == 3
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    assert all(len(line["captions"]) == 2 and line["cf"] == line["captions"][0] for line in lines)
    assert set(report["against_known"]) == {"token_f1", "exact"} and report["against_known"]["exact"]["n"] == 3
    again = run_captioned(settings, trained, dataset, tmp_path / "again", ignore)
    assert (
        again == report and contents(tmp_path / "again")["captions.jsonl"] == (tmp_path / "captions.jsonl").read_bytes()
    )


def test_intervals_against_the_known_captions_are_over_patients(trained: Path, dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "eyes")
    rows = "".join(f"p{i:05d},eye {i // 2},patient {i // 4}\n" for i in range(7))
    (tmp_path / "eyes/eyes.csv").write_text(f"name,eye,patient\n{rows}")
    settings = CaptionedSettings(task="image_to_text", captions=1)
    report = run_captioned(settings, trained, tmp_path / "eyes", tmp_path / "out", ignore)
    for found in report["against_known"].values():
        assert (found["n"], found["eyes"], found["patients"], found["low"]) == (7, 4, 2, None), "two say nothing"
    assert "N = 7, 4 eyes of 2 known patients" in (tmp_path / "out/report.md").read_text()


def test_pictures_without_a_data_set_are_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="needs a data set"):
        run_captioned(CaptionedSettings(task="image_to_text"), trained, None, tmp_path, ignore)


def test_a_cancelled_drawing_stops(trained: Path, tmp_path: Path) -> None:
    def cancel(stage: str, done: int, total: int) -> None:
        if stage == "drawing":
            raise Cancelled("stopped by the test")

    settings = CaptionedSettings(task="text_to_image", texts=(TEXT,), images_per_text=20, ddim_steps=10)
    with pytest.raises(Cancelled):
        run_captioned(settings, trained, None, tmp_path, cancel)
    assert len(list((tmp_path / "images").iterdir())) == 8 and not (tmp_path / "report.json").exists()
