"""From a claim to a work order: everything of the record that the child needs for one unit, read once."""

from __future__ import annotations

from typing import Any

from cffa_core.jobs.records import Checkpoint, Claim, StoredFiles
from cffa_core.jobs.spec import TrainingSpec
from cffa_core.jobs.state import UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.settings import Settings
from services.worker.protocol import WorkOrder, settings_for_child
from services.worker.scratch import Scratch

PARTS_PER_READ = 256


def order_for(store: JobStore, settings: Settings, scratch: Scratch, claim: Claim) -> WorkOrder:
    """The order for ``claim``, with a fresh scratch folder; raises ``NotFound`` if an input was removed."""
    inputs: dict[str, StoredFiles] = {}
    facts: dict[str, Any] = {}
    recorded: list[Checkpoint] = []
    if isinstance(claim.spec, TrainingSpec):
        if claim.kind is UnitKind.TRAIN:
            inputs["dataset"] = store.get_dataset(claim.owner, claim.spec.dataset_id).stored
            recorded = store.checkpoints(claim.owner, claim.job_id)
            facts["recorded_keys"] = sorted(info.key for saved in recorded for info in saved.stored.files.values())
        else:
            (train,) = store.parts(claim.owner, claim.job_id, kind=UnitKind.TRAIN)
            inputs["train"] = train.stored
    else:
        model = store.get_model(claim.owner, claim.spec.model_id)
        facts["model_digest"] = model.digest
        if claim.kind is UnitKind.PART:
            inputs["model"] = model.stored
        else:
            inputs["parts"] = _part_archives(store, claim)
    return WorkOrder(
        settings=settings_for_child(settings),
        job_id=claim.job_id,
        kind=claim.kind,
        index=claim.index,
        attempt=claim.attempt,
        spec=claim.spec,
        numerics_key=claim.numerics_key,
        checkpoints=tuple((saved.step, saved.stored) for saved in reversed(recorded)),
        inputs=inputs,
        facts=facts,
        folder=str(scratch.unit_folder(claim.unit_id, claim.attempt).resolve()),
        cache=str(scratch.cache.resolve()),
    )


def _part_archives(store: JobStore, claim: Claim) -> StoredFiles:
    """The archives of all parts, named by their index."""
    found: dict[str, Any] = {}
    first = 0
    while parts := store.parts(claim.owner, claim.job_id, kind=UnitKind.PART, first=first, limit=PARTS_PER_READ):
        found |= {f"{part.index:05d}": part.stored.files["pairs.zip"] for part in parts}
        first = parts[-1].index + 1
    return StoredFiles(found)
