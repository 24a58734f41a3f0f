"""Make one pair of a finished generation once more, and say whether it is the same to the last bit.

A pair depends on (settings, model, numerics, index, try) alone; so drawing that one pair is enough. No torch here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cffa_core.jobs.spec import GenerateSettings, GenerationSpec, OriginalPair
from cffa_core.recipes.archive import MODALITIES, verify_archive


def one_pair(settings: GenerateSettings, pair: Mapping[str, Any]) -> GenerateSettings:
    """The settings that draw ``pair`` (its entry in a manifest) alone; its gate is not asked again."""
    only = ((int(pair["index"]), int(pair.get("try", 0))),)
    return GenerateSettings.model_validate(settings.model_dump() | {"gate": None, "only": only})


def regeneration(spec: GenerationSpec, job_id: str, pair: Mapping[str, Any]) -> GenerationSpec:
    """The job that makes ``pair`` of the job ``job_id`` (whose spec is ``spec``) once more."""
    original = OriginalPair(job_id=job_id, **{modality: pair[modality]["sha256"] for modality in MODALITIES})
    settings = one_pair(spec.settings(), pair).model_dump()
    return GenerationSpec.model_validate(spec.model_dump() | settings | {"regenerates": original})


def compared(spec: GenerationSpec, archive: Path) -> dict[str, Any]:
    """Whether the one pair in ``archive`` has the bytes of the pair that ``spec`` regenerates.

    ``{"job_id", "index", "same": bool, "cf": {"sha256", "original", "same"}, "fa": ...}``.
    """
    assert spec.regenerates is not None
    (pair,) = verify_archive(archive)["pairs"]
    found = {
        modality: {
            "sha256": pair[modality]["sha256"],
            "original": getattr(spec.regenerates, modality),
            "same": pair[modality]["sha256"] == getattr(spec.regenerates, modality),
        }
        for modality in MODALITIES
    }
    same = all(entry["same"] for entry in found.values())
    return {"job_id": spec.regenerates.job_id, "index": pair["index"], "same": same, **found}
