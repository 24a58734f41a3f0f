"""The captioned model at work: train it on captioned pairs, draw texts, describe pictures (METHODS 7).

Two readable scripts over the parts. Knows nothing of jobs, leases or storage: training has a :class:`JobContext`, use
has a callback.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cffa_core import rng
from cffa_core.captioned.image_coder import LATENT_SIDE
from cffa_core.captioned.model import CaptionedModel
from cffa_core.captioned.model_folder import load_captioned, read_captioned_card
from cffa_core.captioned.text_coder import CaptionSampling
from cffa_core.data.captions import CAPTIONS, Caption, read_captions
from cffa_core.data.contracts import CheckedPair
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.captioned_spec import CaptionedSettings, CaptionedTrainSettings
from cffa_core.jobs.context import JobContext
from cffa_core.methods.pair_sampler import synthetic_marks, write_png
from cffa_core.models.checkpoint import folder_digest
from cffa_core.recipes.captioned_data import load_captioned_data, read_pictures, signed
from cffa_core.recipes.captioned_report import SHOWN, Cell, against_known, report_text, sheet
from cffa_core.recipes.captioned_run import CaptionedRun

OnProgress = Callable[[str, int, int], None]
FORMAT = "cffa-captioned-report/1"
TEXTS = "texts.jsonl"
# Of one forward when pictures are drawn, the last batch padded: a picture does not depend on how many were asked for.
BATCH = 8


def run_captioned_training(
    settings: CaptionedTrainSettings, dataset: Path, out: Path, context: JobContext, *, device: str = "cpu"
) -> dict[str, Any]:
    """Train on a data-set folder with ``captions.jsonl``; return the card of ``out/best_checkpoint``.

    Leaves ``training_log`` and ``validation_log`` (.txt and .jsonl) and ``best_checkpoint/``, the model of the best
    validation; resumes from ``context.latest_checkpoint()``. Raises ``InvalidDataset`` (bad pairs, bad or too long
    captions), ``NotEnoughData``, ``TrainingDiverged``, ``Cancelled``, and ``Conflict`` if the checkpoint belongs to
    other settings, data or captions.
    """
    context.progress("loading", 0, settings.steps)

    def reading(done: int, total: int) -> None:
        context.progress("reading", done, total)

    data = load_captioned_data(dataset, settings.modality, settings.holdout, settings.seed, reading)
    run = CaptionedRun(settings, data, out, context, device)
    run.start()
    while run.step < settings.steps:
        run.train_step()
        last = run.step == settings.steps
        if last or run.step % settings.validate_every == 0:
            run.validate()
        asked = context.wishes()
        if asked or last or run.step % settings.checkpoint_every == 0:
            run.checkpoint()
    return run.card()


def run_captioned(
    settings: CaptionedSettings,
    model: Path,
    dataset: Path | None,
    out: Path,
    on_progress: OnProgress,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw ``settings.texts``, or describe the pictures of ``dataset``; return the report, which is in ``out`` too.

    Leaves ``report.json``, ``report.md``, ``sheet.png`` and ``images/000017.png`` with ``texts.jsonl`` (a line for each
    picture), or ``captions.jsonl``, which a data set may be given. Raises ``InvalidSpec`` for a text that the model
    cannot read or a missing data set, ``ModelUnavailable`` for a model of another family, ``InvalidDataset``; what
    ``on_progress(stage, done, total)`` raises goes through.
    """
    on_progress("loading", 0, 1)
    loaded, trained = load_captioned(model, device)
    card = read_captioned_card(model)
    out.mkdir(parents=True, exist_ok=True)
    digest = folder_digest(model)
    made: dict[str, Any]
    if settings.task == "text_to_image":
        loaded.vocabulary.check(settings.texts, loaded.sizes.max_tokens)
        made, cells = _draw_texts(settings, loaded, trained.modality, digest, out, on_progress)
    elif dataset is None:
        problem = Problem("/dataset_id", "missing", "name the data set whose pictures are to be described")
        raise InvalidSpec("image_to_text needs a data set", problems=(problem,))
    else:
        made, cells = _describe_pictures(settings, loaded, trained.modality, dataset, out, on_progress)
    report = {
        "format": FORMAT,
        "task": settings.task,
        "modality": trained.modality,
        "model": {"digest": digest, "step": card["step"], "dataset_digest": card["dataset_digest"]},
        "settings": settings.model_dump(mode="json", include=set(CaptionedSettings.model_fields)),
        "numerics_key": rng.numerics_key(device=device, dtype="fp32", batch_size=BATCH),
        **made,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (out / "report.md").write_text(report_text(report, cells), encoding="utf-8")
    write_png(out, "sheet.png", sheet(cells))
    return report


def draw_pictures(
    model: CaptionedModel, embeddings: torch.Tensor, seeds: list[int], settings: CaptionedSettings
) -> torch.Tensor:
    """Pictures ``(N, 3, 224, 224)`` uint8 on the CPU, N at most BATCH, of the texts' embeddings ``(N, E)``.

    Picture i depends on its text and its seed alone: noise comes from a CPU generator of its own, and the batch is
    padded to BATCH.
    """
    count = len(seeds)
    rows = torch.cat([embeddings, embeddings[-1:].expand(BATCH - count, -1)])
    if settings.use_diffusion:
        shape = (model.sizes.latent_channels, LATENT_SIDE, LATENT_SIDE)
        noise = [torch.randn(shape, generator=rng.generator(seed, "noise")) for seed in seeds]
        noise += [noise[-1]] * (BATCH - count)
        drawn = model.draw(rows, torch.stack(noise).to(rows.device), settings.ddim_steps, settings.guidance_scale)
    else:
        drawn = model.draw_directly(rows)
    return ((drawn[:count].cpu() + 1) * 127.5).round().to(torch.uint8)


def sampling_of(settings: CaptionedSettings) -> CaptionSampling:
    """How captions are drawn with these settings."""
    return CaptionSampling(settings.temperature, settings.top_k, settings.top_p, settings.repetition_penalty)


def _draw_texts(
    settings: CaptionedSettings, model: CaptionedModel, modality: str, digest: str, out: Path, on_progress: OnProgress
) -> tuple[dict[str, Any], list[Cell]]:
    per_text, total = settings.images_per_text, len(settings.texts) * settings.images_per_text
    known = {text: model.embed_text(text) for text in dict.fromkeys(settings.texts)}
    cells: list[Cell] = []
    with (out / TEXTS).open("w", encoding="utf-8") as lines:
        for start in range(0, total, BATCH):
            indices = range(start, min(start + BATCH, total))
            texts = [settings.texts[index // per_text] for index in indices]
            seeds = [rng.derive_seed(settings.seed, "captioned", index) for index in indices]
            pictures = draw_pictures(model, torch.stack([known[text] for text in texts]), seeds, settings)
            for index, text, seed, picture in zip(indices, texts, seeds, pictures, strict=True):
                image = _image(picture, modality)
                marks = synthetic_marks(modality, index, seed, digest)
                entry = write_png(out, f"images/{index:06d}.png", image, marks)
                lines.write(json.dumps({"index": index, "text": text, "seed": seed, "image": entry}) + "\n")
                if len(cells) < SHOWN:
                    cells.append(Cell(f"{index:06d}", image, (text,)))
            on_progress("drawing", indices[-1] + 1, total)
    return {"pictures": total, "texts": TEXTS}, cells


def _describe_pictures(
    settings: CaptionedSettings, model: CaptionedModel, modality: str, dataset: Path, out: Path, on_progress: OnProgress
) -> tuple[dict[str, Any], list[Cell]]:
    device = model.log_temperature.device
    sampling = sampling_of(settings)
    said: dict[str, str] = {}
    described: list[CheckedPair] = []
    cells: list[Cell] = []
    with (out / CAPTIONS).open("w", encoding="utf-8") as lines:
        for done, (pair, image, total) in enumerate(read_pictures(dataset, modality, settings.max_images), start=1):
            picture = signed(torch.from_numpy(image.copy()).permute(2, 0, 1)).to(device)
            seed = rng.derive_seed(settings.seed, "caption", pair.name)
            captions = model.describe(picture, settings.captions, sampling, seed)
            said[pair.name] = captions[0]
            described.append(pair)
            line = json.loads(Caption(pair.name, **{"cf": None, "fa": None, modality: captions[0]}, findings=()).line())
            lines.write(json.dumps({**line, "captions": captions}, ensure_ascii=False) + "\n")
            if len(cells) < SHOWN:
                cells.append(Cell(pair.name, image, tuple(captions)))
            on_progress("describing", done, total)
    known = {name: text for name, found in read_captions(dataset).items() if (text := getattr(found, modality))}
    nearness = against_known(said, known, described)
    return {"pictures": len(said), "captions": CAPTIONS, "against_known": nearness}, cells


def _image(picture: torch.Tensor, modality: str) -> NDArray[np.uint8]:
    """``(3, H, W)`` as ``(H, W, 3)``, or as the luminance ``(H, W)`` where it is an angiography."""
    colour = picture.permute(1, 2, 0).contiguous().numpy()
    return colour if modality == "cf" else np.asarray(cv2.cvtColor(colour, cv2.COLOR_RGB2GRAY))
