"""The contracts of the service: what each kind of job asks for.

Pydantic models, validated when a job is posted and stored as JSON in the record; a recipe gets the same object. They
say what to compute, never where (no paths, hosts or devices). ``SPEC_VERSION`` rises when a stored spec gains a field
or changes its meaning. The models of each kind are in a file of their own; all are imported from here.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.attention_spec import AttentionSettings, AttentionSpec
from cffa_core.jobs.captioned_spec import (
    CaptionedSettings,
    CaptionedSpec,
    CaptionedTrainingSpec,
    CaptionedTrainSettings,
)
from cffa_core.jobs.edit_spec import EditSettings, EditSpec, EditTerm
from cffa_core.jobs.evaluation_spec import EvaluateSettings, EvaluationSpec
from cffa_core.jobs.export_spec import ExportForm, ExportSettings, ExportSpec, SelectionSpec
from cffa_core.jobs.generation_spec import GateSpec, GenerateSettings, GenerationSpec, OriginalPair
from cffa_core.jobs.spec_fields import (
    CF_PROMPT,
    FA_PROMPT,
    MAX_TRIES,
    ON_STRUCTURES,
    REPORTS,
    SHARE_TIMESTEPS,
    SPEC_VERSION,
    TRAININGS,
    BaseName,
    FolderName,
    Identifier,
    Kind,
    Method,
    NoiseMode,
    PairGrid,
    PairIndex,
    PairTry,
    Prompt,
    Resolution,
    SamplerSpec,
    Scheduler,
    Seed,
    Sha256,
    Spec,
    TokenName,
    check_structures,
    check_tokens,
)
from cffa_core.jobs.training_spec import (
    ControlNetSpec,
    LoraSpec,
    LossSpec,
    SharedAttentionSpec,
    SideBySideSpec,
    TokenSpec,
    TokensSpec,
    TrainingSpec,
    TrainSettings,
)

__all__ = [
    "CF_PROMPT",
    "FA_PROMPT",
    "MAX_TRIES",
    "ON_STRUCTURES",
    "REPORTS",
    "SHARE_TIMESTEPS",
    "SPEC_VERSION",
    "TRAININGS",
    "AttentionSettings",
    "AttentionSpec",
    "BaseName",
    "CaptionedSettings",
    "CaptionedSpec",
    "CaptionedTrainSettings",
    "CaptionedTrainingSpec",
    "ControlNetSpec",
    "EditSettings",
    "EditSpec",
    "EditTerm",
    "EvaluateSettings",
    "EvaluationSpec",
    "ExportForm",
    "ExportSettings",
    "ExportSpec",
    "FolderName",
    "GateSpec",
    "GenerateSettings",
    "GenerationSpec",
    "Identifier",
    "JobSpec",
    "Kind",
    "LoraSpec",
    "LossSpec",
    "Method",
    "NoiseMode",
    "OriginalPair",
    "PairGrid",
    "PairIndex",
    "PairTry",
    "Prompt",
    "Resolution",
    "SamplerSpec",
    "Scheduler",
    "Seed",
    "SelectionSpec",
    "Sha256",
    "SharedAttentionSpec",
    "SideBySideSpec",
    "Spec",
    "TokenName",
    "TokenSpec",
    "TokensSpec",
    "TrainSettings",
    "TrainingSpec",
    "check_structures",
    "check_tokens",
    "parse_spec",
]

JobSpec = Annotated[
    TrainingSpec
    | GenerationSpec
    | EvaluationSpec
    | ExportSpec
    | AttentionSpec
    | EditSpec
    | CaptionedTrainingSpec
    | CaptionedSpec,
    Field(discriminator="kind"),
]
_JOB_SPEC: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)


def parse_spec(raw: dict[str, Any]) -> JobSpec:
    """Validate a stored or posted spec; raises :class:`InvalidSpec` with one problem per bad field."""
    try:
        return _JOB_SPEC.validate_python(raw)
    except ValidationError as error:
        problems = tuple(
            Problem(
                "/" + "/".join(str(part) for part in item["loc"] if part not in list(Kind)),
                str(item["type"]),
                str(item["msg"]),
            )
            for item in error.errors()
        )
        raise InvalidSpec("the job specification is not valid", problems=problems) from error
