"""What a job's specification names must exist and be fit for it; every finding is told at once.

Asked once, when a job is posted. What is gone by the time a worker begins ends the job there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sqlalchemy as sa

from cffa_core.errors import InvalidSpec, NotFound, Problem
from cffa_core.jobs.catalog import get_dataset, get_model
from cffa_core.jobs.edits import MAKE_PAIRS, with_count
from cffa_core.jobs.exports import with_finished_parts
from cffa_core.jobs.model_inputs import too_many_images, unfit_family, without_captions
from cffa_core.jobs.records import NOVELTY_FILE
from cffa_core.jobs.schema import jobs, models, units
from cffa_core.jobs.spec import (
    AttentionSpec,
    CaptionedSpec,
    CaptionedTrainingSpec,
    EditSpec,
    EvaluationSpec,
    ExportSpec,
    GenerationSpec,
    JobSpec,
    Kind,
    Method,
    TrainingSpec,
    check_structures,
)
from cffa_core.jobs.state import JobState, UnitKind
from cffa_core.jobs.token_inputs import unknown_tokens, without_masks
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.manifest import stored_from_json


def checked_inputs(connection: sa.Connection, owner: str, spec: JobSpec) -> JobSpec:
    """The spec as it is to be stored: an evaluation that left its training data set out names it afterwards, an export
    the parts that are finished, an edit the number of its pairs.

    Raises :class:`InvalidSpec` with a problem for each id that ``owner`` does not have or that does not fit.
    """
    if isinstance(spec, ExportSpec):
        return with_finished_parts(connection, owner, spec)
    if isinstance(spec, EditSpec):
        return with_count(connection, owner, spec)
    problems: list[Problem] = []

    def look(pointer: str, find: Callable[[sa.Connection, str, str], object], id_: str | None) -> None:
        if id_ is None:
            return
        try:
            find(connection, owner, id_)
        except NotFound as error:
            problems.append(Problem(pointer, "not_found", f"{error.message}; name one of your own"))

    if isinstance(spec, TrainingSpec):
        look("/dataset_id", get_dataset, spec.dataset_id)
        if not problems and spec.controlnet is not None and spec.controlnet.vessels == "masks":
            problems += _without_vessels(connection, owner, spec.dataset_id, "/controlnet/vessels")
        if not problems and spec.tokens is not None:
            problems += without_masks(connection, owner, spec.dataset_id, spec.tokens)
    elif isinstance(spec, GenerationSpec):
        look("/model_id", get_model, spec.model_id)
        look("/structure_dataset_id", get_dataset, spec.structure_dataset_id)
        if not problems:
            problems += unfit_family(connection, owner, spec.model_id, captioned=False)
        if not problems:
            problems += _unfit_structures(connection, owner, spec)
            problems += unknown_tokens(connection, owner, spec)
            problems += _unknown_training(connection, owner, spec)
        problems += _unfit_original(connection, owner, spec)
    elif isinstance(spec, CaptionedTrainingSpec):
        look("/dataset_id", get_dataset, spec.dataset_id)
        if not problems:
            problems += without_captions(connection, owner, spec.dataset_id, spec.modality)
    elif isinstance(spec, AttentionSpec | CaptionedSpec):
        look("/model_id", get_model, spec.model_id)
        if not problems:
            problems += unfit_family(connection, owner, spec.model_id, captioned=isinstance(spec, CaptionedSpec))
        if isinstance(spec, AttentionSpec) and not problems:
            problems += _unfit_structures(connection, owner, spec)
        if isinstance(spec, CaptionedSpec):
            look("/dataset_id", get_dataset, spec.dataset_id)
            problems += too_many_images(spec)
    else:
        for name in ("pairs_dataset_id", "reference_dataset_id", "train_dataset_id"):
            look(f"/{name}", get_dataset, getattr(spec, name))
            if not problems and getattr(spec, name) is not None:
                problems += _too_small(connection, owner, getattr(spec, name), f"/{name}")
        if spec.reference_split is not None and not problems:
            problems += _without_part(connection, owner, spec.reference_dataset_id, spec.reference_split)
        if spec.generation_job_id is not None:
            problems += _unfit(connection, owner, spec.generation_job_id)
    if problems:
        raise InvalidSpec("the job specification names something that it cannot use", problems=tuple(problems))
    return _with_training(connection, owner, spec) if isinstance(spec, EvaluationSpec) else spec


def _unfit_structures(connection: sa.Connection, owner: str, spec: GenerationSpec | AttentionSpec) -> list[Problem]:
    """Why a model cannot draw on the structures named, or not without any; empty if it can."""
    card = get_model(connection, owner, spec.model_id).card
    if card.get("method") not in list(Method):
        return []  # a card that does not say; the worker reads the model itself
    try:
        check_structures(Method(card["method"]), spec.structures)
    except InvalidSpec as error:
        return list(error.problems)
    trained = card.get("settings", {}).get("controlnet") or {}
    if isinstance(spec, AttentionSpec) or spec.structure_dataset_id is None or trained.get("vessels") != "masks":
        return []
    return _without_vessels(connection, owner, spec.structure_dataset_id, "/structure_dataset_id")


def _without_vessels(connection: sa.Connection, owner: str, dataset_id: str, pointer: str) -> list[Problem]:
    """A problem if the vessel masks of a data set are wanted and its report says that it has none."""
    pairs = get_dataset(connection, owner, dataset_id).report.get("pairs", ())
    if all("vessel" in pair.get("masks", ()) for pair in pairs):
        return []
    message = f"data set {dataset_id} has no vessel masks; upload it with masks/vessel/NAME.png for each pair"
    return [Problem(pointer, "missing_mask", message)]


def novelty_file(connection: sa.Connection, owner: str, model_id: str) -> ObjectInfo | None:
    """The thumbnails of the pairs that a model was trained on; None if its training left none, or is gone.

    They belong to the training job and go with it; the model stays. Raises :class:`NotFound` for another's model.
    """
    stored = connection.scalar(
        sa.select(units.c.stored)
        .join(jobs, jobs.c.id == units.c.job_id)
        .where(
            jobs.c.id == get_model(connection, owner, model_id).job_id,
            jobs.c.owner == owner,
            jobs.c.state != JobState.EXPIRED.value,
            units.c.kind == UnitKind.TRAIN.value,
        )
    )
    return stored_from_json(stored).files.get(NOVELTY_FILE)


def _unknown_training(connection: sa.Connection, owner: str, spec: GenerationSpec) -> list[Problem]:
    """A problem if pairs are to be compared with those of the training, and these are not known."""
    if spec.gate is None or spec.gate.max_similarity_to_training is None:
        return []
    if novelty_file(connection, owner, spec.model_id) is not None:
        return []
    message = (
        f"the pairs that model {spec.model_id} was trained on are not known: its training is older than this, or was "
        "deleted; train again, or leave max_similarity_to_training out"
    )
    return [Problem("/gate/max_similarity_to_training", "training_unknown", message)]


def _unfit_original(connection: sa.Connection, owner: str, spec: GenerationSpec) -> list[Problem]:
    """A problem if the job whose pair is to be made once more is not there, or has made none."""
    if spec.regenerates is None or numerics_of(connection, owner, spec) is not None:
        return []
    message = f"no generation job {spec.regenerates.job_id} that has made a pair; name one of your own"
    return [Problem("/regenerates/job_id", "not_found", message)]


def numerics_of(connection: sa.Connection, owner: str, spec: JobSpec) -> str | None:
    """The numerics key that a job is bound to before its first claim: that of the job whose pair it regenerates."""
    if not isinstance(spec, GenerationSpec) or spec.regenerates is None:
        return None
    key: str | None = connection.scalar(
        sa.select(jobs.c.numerics_key).where(
            jobs.c.id == spec.regenerates.job_id,
            jobs.c.owner == owner,
            jobs.c.kind == Kind.GENERATION.value,
            jobs.c.generated > 0,
        )
    )
    return key


def _too_small(connection: sa.Connection, owner: str, dataset_id: str, pointer: str) -> list[Problem]:
    """A problem if a data set is to be compared and has one pair alone."""
    if get_dataset(connection, owner, dataset_id).pairs >= 2:
        return []
    message = f"data set {dataset_id} has one pair; at least 2 can be measured"
    return [Problem(pointer, "too_few_pairs", message)]


def _without_part(connection: sa.Connection, owner: str, dataset_id: str, part: str) -> list[Problem]:
    """A problem unless a data set has pairs in this part of a split."""
    if len((get_dataset(connection, owner, dataset_id).split or {}).get(part, ())) >= 2:
        return []
    message = f"data set {dataset_id} has fewer than two pairs for {part}; name a version with a split that has"
    return [Problem("/reference_split", "no_such_part", message)]


def _unfit(connection: sa.Connection, owner: str, job_id: str) -> list[Problem]:
    """Why the pairs of a job cannot be measured; empty if they can."""
    pointer = "/generation_job_id"
    row = connection.execute(
        sa.select(
            jobs.c.kind, jobs.c.state, jobs.c.requested, (jobs.c.generated - jobs.c.rejected).label("pairs")
        ).where(jobs.c.id == job_id, jobs.c.owner == owner)
    ).one_or_none()
    if row is None:
        return [Problem(pointer, "not_found", f"no job {job_id}; name one of your own")]
    if row.kind not in MAKE_PAIRS:
        message = f"job {job_id} is a {row.kind} job; name one of kind generation or edit, whose product are pairs"
        return [Problem(pointer, "not_a_generation_job", message)]
    if row.state == JobState.EXPIRED.value:
        message = f"the pairs of job {job_id} were removed by retention; generate them again"
        return [Problem(pointer, "expired", message)]
    if row.state != JobState.SUCCEEDED.value:
        message = f"job {job_id} is {row.state}; post this again when it has succeeded"
        return [Problem(pointer, "not_succeeded", message)]
    if min(row.requested, row.pairs) < 2:
        message = f"job {job_id} has made {row.pairs} pair(s); at least 2 can be measured"
        return [Problem(pointer, "too_few_pairs", message)]
    return []


def _with_training(connection: sa.Connection, owner: str, spec: EvaluationSpec) -> EvaluationSpec:
    """The spec with the data set that the generation job's model was trained on, if none is named and one is known.

    Left out where it is the reference itself: nearest neighbours of a set in itself measure no memorisation.
    """
    if spec.train_dataset_id is not None or spec.generation_job_id is None:
        return spec
    generation = jobs.alias()
    stored: dict[str, Any] | None = connection.scalar(
        sa.select(jobs.c.spec)
        .join(models, models.c.job_id == jobs.c.id)
        .join(generation, generation.c.spec["model_id"].as_string() == models.c.id)
        .where(generation.c.id == spec.generation_job_id, models.c.owner == owner)
    )
    found = None if stored is None else stored["dataset_id"]
    if found is None or (found == spec.reference_dataset_id and spec.reference_split in (None, "train")):
        return spec
    try:
        get_dataset(connection, owner, found)
    except NotFound:
        return spec
    return spec.model_copy(update={"train_dataset_id": found})
