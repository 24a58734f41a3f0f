"""Where generated and edited pairs come from: what stands at the head of every manifest (docs/provenance.md).

Values that follow from the settings, the model and the numerics alone; no ids, object keys or clock times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cffa_core import __version__
from cffa_core.jobs.spec import EditSettings, GenerateSettings

_VERSIONS = re.compile(r"/torch-(?P<torch>[^/]+)/diffusers-(?P<diffusers>[^/]+)/")


def provenance(
    settings: GenerateSettings,
    *,
    model_digest: str | None,
    dataset_digest: str | None,
    numerics_key: str | None,
    structures_digest: str | None = None,
) -> dict[str, Any]:
    """Header of a manifest of generated pairs.

    ``dataset_digest`` is that of the data set that the model was trained on, ``structures_digest`` of the one whose
    structures were drawn on. torch and diffusers are those of the numerics key, not those of whoever writes the file.
    """
    return {
        "synthetic": True,
        "spec": settings.model_dump(mode="json", include=set(GenerateSettings.model_fields)),
        "model_digest": model_digest,
        "dataset_digest": dataset_digest,
        "versions": _versions(numerics_key),
        "numerics_key": numerics_key,
        **({"structures": {"digest": structures_digest}} if structures_digest is not None else {}),
    }


def edit_provenance(
    settings: EditSettings,
    *,
    base: str | None,
    model_digest: str | None,
    dataset_digest: str | None,
    numerics_key: str | None,
    source: Mapping[str, Any],
) -> dict[str, Any]:
    """Header of a manifest of edited pairs; ``base`` is named where it edits without a model.

    ``source`` says by digest what was edited: ``{"dataset": ...}`` or, of the manifest of an earlier job,
    ``{"generation": ...}``. Which pair of it each one was, stands with the pair.
    """
    return {
        "synthetic": True,
        "edited": True,
        "spec": settings.model_dump(mode="json", include=set(EditSettings.model_fields)),
        **({} if base is None else {"base": base}),
        "model_digest": model_digest,
        "dataset_digest": dataset_digest,
        "versions": _versions(numerics_key),
        "numerics_key": numerics_key,
        "source": dict(source),
    }


def _versions(numerics_key: str | None) -> dict[str, str | None]:
    found = _VERSIONS.search(numerics_key or "")
    libraries = found.groupdict() if found is not None else {"torch": None, "diffusers": None}
    return {"cffa": __version__, **libraries}
