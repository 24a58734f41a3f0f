"""Which models and data sets fit which kind of job: pair models and captioned ones, data sets with captions.

Part of the checks of ``inputs``, when a job is posted; each function returns what is wrong, and nothing if all is well.
"""

from __future__ import annotations

import sqlalchemy as sa

from cffa_core.errors import Problem
from cffa_core.jobs.captioned_spec import CaptionedSettings
from cffa_core.jobs.catalog import get_dataset, get_model

CAPTIONED = "captioned"
"""What the card of a captioned model names under ``family``; the card of a pair model has no family."""
MAX_IMAGES = 10_000


def unfit_family(connection: sa.Connection, owner: str, model_id: str, *, captioned: bool) -> list[Problem]:
    """A problem if a captioned model is named where a pair model is needed (``captioned`` False), or the reverse."""
    if (get_model(connection, owner, model_id).card.get("family") == CAPTIONED) is captioned:
        return []
    if captioned:
        message = f"{model_id} is a model of pairs; name the model of a captioned_training job"
        return [Problem("/model_id", "not_a_captioned_model", message)]
    message = f"{model_id} is a captioned model, which makes no pairs; name the model of a training job"
    return [Problem("/model_id", "not_a_pair_model", message)]


def without_captions(connection: sa.Connection, owner: str, dataset_id: str, modality: str) -> list[Problem]:
    """A problem unless two pairs of a data set have a caption of this modality at least."""
    has = int(get_dataset(connection, owner, dataset_id).report.get("captions", {}).get(modality, 0))
    if has >= 2:
        return []
    message = (
        f"data set {dataset_id} has {has} captions of its {modality.upper()} images; upload it with captions.jsonl: "
        f'a line {{"name": "m001", "{modality}": "..."}} for each pair'
    )
    return [Problem("/dataset_id", "no_captions", message)]


def too_many_images(settings: CaptionedSettings) -> list[Problem]:
    """A problem if one job would draw more than ``MAX_IMAGES`` images."""
    images = len(settings.texts) * settings.images_per_text
    if images <= MAX_IMAGES:
        return []
    message = f"this asks for {images} images, and one job draws at most {MAX_IMAGES}; post several jobs"
    return [Problem("/images_per_text", "too_many_images", message)]
