"""Trainings, generations, evaluations and exports as posted; the other kinds have theirs beside their routes.

What may be posted is defined in ``cffa_core.jobs.spec``; here it only gains what belongs to HTTP: examples, and the
terms of the job.
"""

from __future__ import annotations

from pydantic import ConfigDict

from cffa_core.jobs.spec import EvaluationSpec, ExportSettings, ExportSpec, GenerationSpec, TrainingSpec
from services.api.job_terms import TERMS, JobTerms
from services.api.schemas import DATASET, JOB, MODEL


class TrainingJobRequest(TrainingSpec, JobTerms):
    """A training job as posted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"dataset_id": DATASET, "base": "tiny", "steps": 2000, "batch_size": 1},
                {
                    "dataset_id": DATASET,
                    "method": "shared_attention",
                    "shared_attention": {"max_resolution": 32, "step_range": [0.0, 0.6]},
                    "steps": 2000,
                },
            ]
        }
    )

    def spec(self) -> TrainingSpec:
        """The part that is stored and computed."""
        return TrainingSpec.model_validate(self.model_dump(exclude=set(TERMS)))


class GenerationJobRequest(GenerationSpec, JobTerms):
    """A generation job as posted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model_id": MODEL, "count": 1000, "seed": 7, "sampler": {"scheduler": "dpm++2m", "steps": 25}}
            ]
        }
    )

    def spec(self) -> GenerationSpec:
        """The part that is stored and computed."""
        return GenerationSpec.model_validate(self.model_dump(exclude=set(TERMS)))


class EvaluationJobRequest(EvaluationSpec, JobTerms):
    """An evaluation job as posted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"generation_job_id": JOB, "reference_dataset_id": DATASET, "max_pairs": 256}]}
    )

    def spec(self) -> EvaluationSpec:
        """The part that is stored and computed."""
        return EvaluationSpec.model_validate(self.model_dump(exclude=set(TERMS)))


class ExportRequest(ExportSettings, JobTerms):
    """An export as posted; which job it is of stands in the path."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"form": "webdataset", "shard_size": 1000},
                {"form": "dicom", "selection": {"first": 0, "last": 99, "min_alignment": 0.4}},
            ]
        }
    )

    def spec(self, job_id: str) -> ExportSpec:
        """The part that is stored and computed."""
        return ExportSpec(generation_job_id=job_id, **self.model_dump(exclude=set(TERMS)))
