"""Where generated pairs come from: what stands at the head of every manifest (docs/provenance.md).

Values that follow from the settings, the model and the numerics alone; no ids, object keys or clock times.
"""

from __future__ import annotations

import re
from typing import Any

from cffa_core import __version__
from cffa_core.jobs.spec import GenerateSettings

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
    found = _VERSIONS.search(numerics_key or "")
    libraries = found.groupdict() if found is not None else {"torch": None, "diffusers": None}
    return {
        "synthetic": True,
        "spec": settings.model_dump(mode="json", include=set(GenerateSettings.model_fields)),
        "model_digest": model_digest,
        "dataset_digest": dataset_digest,
        "versions": {"cffa": __version__, **libraries},
        "numerics_key": numerics_key,
        **({"structures": {"digest": structures_digest}} if structures_digest is not None else {}),
    }
