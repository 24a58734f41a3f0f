"""The folder of a captioned model: ``model.json`` (family ``captioned``), ``tokenizer.json``, ``model.safetensors``.

Written whole or not at all, digests checked when read; a folder of a pair method is refused here, and this one there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from cffa_core.captioned.model import CaptionedModel
from cffa_core.captioned.vocabulary import Vocabulary
from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.captioned_spec import CaptionedTrainSettings
from cffa_core.models.checkpoint import describe_files, publish, verify_files

FORMAT = "cffa-captioned/1"
FAMILY = "captioned"
CARD, TOKENIZER, WEIGHTS = "model.json", "tokenizer.json", "model.safetensors"


def save_captioned(
    folder: Path,
    model: CaptionedModel,
    settings: CaptionedTrainSettings,
    *,
    step: int,
    dataset_digest: str,
    captions_digest: str,
    validation: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Write the model folder and return its card; equal models give equal bytes."""
    with publish(folder) as staging:
        model.vocabulary.save(staging / TOKENIZER)
        weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
        (staging / WEIGHTS).write_bytes(save(weights))
        card = {
            "format": FORMAT,
            "family": FAMILY,
            "modality": settings.modality,
            "settings": settings.model_dump(mode="json", include=set(CaptionedTrainSettings.model_fields)),
            "words": len(model.vocabulary.words),
            "step": step,
            "dataset_digest": dataset_digest,
            "captions_digest": captions_digest,
            "validation": dict(validation) if validation is not None else None,
            "parameters": model.parameter_counts(),
            "files": describe_files(staging),
        }
        (staging / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return card


def read_captioned_card(folder: Path) -> dict[str, Any]:
    """The card of a captioned model; raises ``ModelUnavailable`` for another folder, ``CorruptArtifact`` if no JSON."""
    path = folder / CARD
    if not path.is_file():
        raise ModelUnavailable(f"{folder.name!r} is no model folder: it has no {CARD}")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtifact(f"{folder.name}/{CARD} is not JSON: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT or card.get("family") != FAMILY:
        found = card.get("method") if isinstance(card, dict) else None
        also = f"; it is a model of method {found}, which draws pairs" if found else ""
        raise ModelUnavailable(f"{folder.name}/{CARD} is not of the family {FAMILY} ({FORMAT}){also}")
    return card


def load_captioned(folder: Path, device: str = "cpu") -> tuple[CaptionedModel, CaptionedTrainSettings]:
    """The model of a folder, ready for use, and what it was trained with.

    Raises ``ModelUnavailable`` if it is of another family, ``CorruptArtifact`` if its files are not as written.
    """
    card = read_captioned_card(folder)
    verify_files(folder, card["files"])
    try:
        settings = CaptionedTrainSettings.model_validate(card["settings"])
    except ValidationError as error:
        raise CorruptArtifact(f"the settings in {folder.name}/{CARD} are not readable: {error}") from error
    model = CaptionedModel.build(settings.sizes, Vocabulary.load(folder / TOKENIZER), seed=0)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CorruptArtifact(f"{folder.name}/{WEIGHTS} does not hold this model's weights: {error}") from error
    return model.to(device).eval(), settings
