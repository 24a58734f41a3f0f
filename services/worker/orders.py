"""From a claim to a work order: everything of the record that the child needs for one unit, read once."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import Any

from cffa_core import tracing
from cffa_core.errors import Expired
from cffa_core.jobs.edits import names_in
from cffa_core.jobs.exports import numbers_of
from cffa_core.jobs.records import NOVELTY_FILE, Checkpoint, Claim, Dataset, Job, StoredFiles
from cffa_core.jobs.spec import (
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EditSpec,
    EvaluationSpec,
    ExportSpec,
    GenerationSpec,
    Kind,
    PairGrid,
    TrainingSpec,
)
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.store import JobStore
from cffa_core.rng import derive_seed
from cffa_core.settings import Settings
from services.worker.protocol import WorkOrder, settings_for_child
from services.worker.scratch import Scratch

PARTS_PER_READ = 256


def order_for(store: JobStore, settings: Settings, scratch: Scratch, claim: Claim) -> WorkOrder:
    """The order for ``claim``, with a fresh scratch folder; raises ``NotFound`` if an input was removed."""
    inputs: dict[str, StoredFiles] = {}
    facts: dict[str, Any] = {}
    recorded: list[Checkpoint] = []
    if isinstance(claim.spec, TrainingSpec | CaptionedTrainingSpec):
        if claim.kind is UnitKind.TRAIN:
            inputs["dataset"] = store.get_dataset(claim.owner, claim.spec.dataset_id).stored
            recorded = store.checkpoints(claim.owner, claim.job_id)
            facts["recorded_keys"] = sorted(info.key for saved in recorded for info in saved.stored.files.values())
        else:
            (train,) = store.parts(claim.owner, claim.job_id, kind=UnitKind.TRAIN)
            inputs["train"] = train.stored
    elif isinstance(claim.spec, EvaluationSpec):
        if claim.kind is UnitKind.EVALUATE:
            _name_sets(store, claim.owner, claim.spec, inputs, facts)
        else:
            (evaluated,) = store.parts(claim.owner, claim.job_id, kind=UnitKind.EVALUATE)
            inputs["evaluate"], facts["sets"] = evaluated.stored, evaluated.info.get("sets", {})
    elif isinstance(claim.spec, ExportSpec):
        if claim.kind is UnitKind.EXPORT:
            inputs["parts"] = _parts_to_export(store, claim.owner, claim.spec)
        else:
            (exported,) = store.parts(claim.owner, claim.job_id, kind=UnitKind.EXPORT)
            inputs["export"], facts["export"] = exported.stored, exported.info
    elif isinstance(claim.spec, AttentionSpec | CaptionedSpec):
        if claim.kind is UnitKind.COMPUTE:
            _name_inputs(store, claim.owner, claim.spec, inputs, facts)
        else:
            (computed,) = store.parts(claim.owner, claim.job_id, kind=UnitKind.COMPUTE)
            inputs["report"], facts["inputs"] = computed.stored, computed.info["inputs"]
    elif isinstance(claim.spec, EditSpec):
        _name_edited(store, claim, claim.spec, inputs, facts)
    else:
        model = store.get_model(claim.owner, claim.spec.model_id)
        facts["model_digest"], facts["dataset_digest"] = model.digest, model.card.get("dataset_digest")
        if claim.spec.structure_dataset_id is not None:
            structures = store.get_dataset(claim.owner, claim.spec.structure_dataset_id)
            facts["structures_digest"] = structures.digest
            if claim.kind is UnitKind.PART:
                inputs["structures"] = structures.stored
        if claim.kind is UnitKind.PART:
            inputs["model"] = model.stored
            if (known := store.novelty_file(claim.owner, model.id)) is not None:
                inputs["novelty"] = StoredFiles({NOVELTY_FILE: known})
        else:
            inputs["parts"] = _part_archives(store, claim)
    facts |= {"worker_id": claim.worker_id, "traceparent": tracing.traceparent()}
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


def _name_inputs(
    store: JobStore,
    owner: str,
    spec: AttentionSpec | CaptionedSpec,
    inputs: dict[str, StoredFiles],
    facts: dict[str, Any],
) -> None:
    """The model of a report, and the data set if it has one: their files into ``inputs``, digests into ``facts``."""
    model = store.get_model(owner, spec.model_id)
    inputs["model"], facts["inputs"] = model.stored, {"model_digest": model.digest}
    if isinstance(spec, CaptionedSpec) and spec.dataset_id is not None:
        dataset = store.get_dataset(owner, spec.dataset_id)
        inputs["dataset"] = dataset.stored
        facts["inputs"] |= {"dataset": {"name": dataset.name, "digest": dataset.digest, "pairs": dataset.pairs}}


def _name_edited(
    store: JobStore, claim: Claim, spec: EditSpec, inputs: dict[str, StoredFiles], facts: dict[str, Any]
) -> None:
    """Model and pairs of an edit: ``facts["source"]`` is the digest of what is edited; of a part also the files of
    both, and index and name (or index) of each of its pairs: ``facts["sources"]``."""
    is_part = claim.kind is UnitKind.PART
    facts["model_digest"] = facts["dataset_digest"] = None
    if spec.model_id is not None:
        model = store.get_model(claim.owner, spec.model_id)
        facts["model_digest"], facts["dataset_digest"] = model.digest, model.card.get("dataset_digest")
        if is_part:
            inputs["model"] = model.stored
    which: Sequence[str | int]
    if spec.dataset_id is not None:
        dataset = store.get_dataset(claim.owner, spec.dataset_id)
        facts["source"] = {"dataset": dataset.digest}
        which = spec.names or names_in(dataset.stored)
        if is_part:
            inputs["dataset"] = dataset.stored
    else:
        job = store.get_job(claim.owner, str(spec.generation_job_id))
        if job.state is JobState.EXPIRED:
            raise Expired(f"the pairs of job {job.id} were removed by retention; make them again")
        assert isinstance(job.spec, PairGrid)  # posted only for such a job
        facts["source"] = {str(job.kind): (job.result or {}).get("manifest", {}).get("sha256")}
        which = chosen = spec.pair_indices or _made(store, claim.owner, job)
        if is_part:
            needed = {job.spec.part_of(chosen[index]) for index in spec.part_range(claim.index)}
            inputs["pairs"] = _part_files(store, claim.owner, job.id, needed)
    if is_part:
        facts["sources"] = [[index, which[index]] for index in spec.part_range(claim.index)]
    else:
        inputs["parts"] = _part_archives(store, claim)


def _name_sets(
    store: JobStore, owner: str, spec: EvaluationSpec, inputs: dict[str, StoredFiles], facts: dict[str, Any]
) -> None:
    """The sets of pairs of an evaluation: their files into ``inputs``, name, digest and size into ``facts["sets"]``.

    Of a generation job that made more than ``max_pairs`` pairs a seeded choice is fetched: ``facts["indices"]``.
    """
    sets: dict[str, dict[str, Any]] = {}

    def add(role: str, dataset: Dataset) -> None:
        inputs[role] = dataset.stored
        sets[role] = {"name": dataset.name, "digest": dataset.digest, "pairs": dataset.pairs}

    if spec.pairs_dataset_id is not None:
        add("pairs", store.get_dataset(owner, spec.pairs_dataset_id))
    elif spec.generation_job_id is not None:
        job = store.get_job(owner, spec.generation_job_id)
        assert isinstance(job.spec, PairGrid)  # posted only for such a job
        if job.state is JobState.EXPIRED:
            raise Expired(f"the pairs of job {job.id} were removed by retention")
        manifest = (job.result or {}).get("manifest", {})
        indices = _made(store, owner, job)
        total = len(indices)
        if len(indices) > spec.max_pairs:
            chosen = random.Random(derive_seed(spec.seed, "choose generated pairs")).sample(indices, spec.max_pairs)
            indices = sorted(chosen)
        needed = {job.spec.part_of(index) for index in indices}
        inputs["pairs"] = _part_files(store, owner, job.id, needed)
        facts["indices"] = indices
        name = "edited" if job.kind is Kind.EDIT else "generated"
        sets["pairs"] = {"name": name, "digest": manifest.get("sha256"), "pairs": total}
    add("reference", store.get_dataset(owner, spec.reference_dataset_id))
    if spec.train_dataset_id is not None:
        add("train", store.get_dataset(owner, spec.train_dataset_id))
    facts["sets"] = sets


def _made(store: JobStore, owner: str, job: Job) -> list[int]:
    """Indices of the pairs that a job made: all it was asked for, unless a gate left slots empty."""
    assert isinstance(job.spec, PairGrid)
    if not isinstance(job.spec, GenerationSpec) or job.spec.gate is None:
        return list(job.spec.indices)
    found: list[int] = []
    first = 0
    while parts := store.parts(owner, job.id, kind=UnitKind.PART, first=first, limit=PARTS_PER_READ):
        found += [int(index) for part in parts for index in part.info["pairs"]]
        first = parts[-1].index + 1
    return found


def _parts_to_export(store: JobStore, owner: str, spec: ExportSpec) -> StoredFiles:
    job = store.get_job(owner, spec.generation_job_id)
    if job.state is JobState.EXPIRED:
        raise Expired(f"the pairs of job {job.id} were removed by retention; generate them again")
    return _part_files(store, owner, job.id, set(numbers_of(spec.parts)))


def _part_files(store: JobStore, owner: str, job_id: str, needed: Collection[int | None]) -> StoredFiles:
    """Archives and indices of the ``needed`` parts of a job of pairs: ``00017/pairs.zip``, ``00017/part.json``."""
    found: dict[str, Any] = {}
    numbers = [number for number in needed if number is not None]
    first, last = min(numbers, default=0), max(numbers, default=-1)
    while first <= last:
        parts = store.parts(owner, job_id, kind=UnitKind.PART, first=first, limit=PARTS_PER_READ)
        if not parts:
            break
        for part in parts:
            if part.index in needed:
                found |= {f"{part.index:05d}/{name}": part.stored.files[name] for name in ("pairs.zip", "part.json")}
        first = parts[-1].index + 1
    return StoredFiles(found)


def _part_archives(store: JobStore, claim: Claim) -> StoredFiles:
    """The archives of all parts, named by their index."""
    found: dict[str, Any] = {}
    first = 0
    while parts := store.parts(claim.owner, claim.job_id, kind=UnitKind.PART, first=first, limit=PARTS_PER_READ):
        found |= {f"{part.index:05d}": part.stored.files["pairs.zip"] for part in parts}
        first = parts[-1].index + 1
    return StoredFiles(found)
