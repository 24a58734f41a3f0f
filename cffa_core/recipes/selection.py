"""Which generated pairs an export takes, and in which form it may, by what is recorded; no pixels are looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import ExportForm, SelectionSpec


def selects(selection: SelectionSpec, entry: Mapping[str, Any]) -> bool:
    """Whether a pair as its manifest lists it fits ``selection``.

    Raises ``InvalidSpec`` where a condition asks for what is not recorded: archives of older versions have no scores,
    and similarity is known only where the training pairs were.
    """
    if not selection.spans(int(entry["index"])):
        return False
    if selection.min_alignment is not None:
        from cffa_core.evaluation.pair_scores import ALIGNMENT  # it brings the image libraries along

        if "alignment" in entry and entry["alignment"] is None:
            return False  # CF and FA show too little in common to be scored, so a gate would not have let it through
        if _recorded(entry, "alignment", ALIGNMENT, "min_alignment") < selection.min_alignment:
            return False
    limit = selection.max_similarity_to_training
    return limit is None or _recorded(entry, "novelty", "similarity", "max_similarity_to_training") <= limit


def require_gate(selection: SelectionSpec, spec: object) -> None:
    """Raise ``InvalidSpec`` if only accepted pairs are wanted of pairs that were drawn without a gate.

    ``spec`` are the settings of the generation. What was drawn with a gate and is in an archive has passed it.
    """
    if selection.accepted_only and not (isinstance(spec, Mapping) and spec.get("gate")):
        message = "these pairs were drawn without a gate, so none was accepted or rejected; select by min_alignment"
        raise InvalidSpec(message, problems=(Problem("/selection/accepted_only", "no_gate", message),))


def require_synthetic(form: ExportForm, header: Mapping[str, Any]) -> None:
    """Raise ``InvalidSpec`` if pairs that may show a patient, edits of others than generated ones, are wanted as DICOM.

    ``header`` is that of their manifest. Where an edit did not act the image is its source's to the last bit, and what
    DICOM asks for (whose eye, which side, when) is not known of it.
    """
    source = header.get("source")
    if form == "dicom" and header.get("edited") and not (isinstance(source, Mapping) and "generation" in source):
        message = (
            "edits of a data set, or of earlier edits, may show a patient: DICOM is written of generated pairs and of "
            "edits of these; take zip or webdataset"
        )
        raise InvalidSpec(message, problems=(Problem("/form", "not_synthetic", message),))


def _recorded(entry: Mapping[str, Any], group: str, name: str, condition: str) -> float:
    values = entry.get(group)
    value = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        message = f"pair {entry['index']} has no recorded {name} ({group}); leave {condition} out"
        raise InvalidSpec(message, problems=(Problem(f"/selection/{condition}", "not_recorded", message),))
    return float(value)
