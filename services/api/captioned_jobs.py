"""Posting jobs of the captioned model: its training, and pictures from texts or captions of pictures.

The training makes a model (``models``), the other a report (``reports``).
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import ConfigDict

from cffa_core.jobs.spec import CaptionedSpec, CaptionedTrainingSpec
from services.api.access import IdempotencyKey, Owner, TheBackend
from services.api.job_terms import TERMS, JobTerms
from services.api.jobs import create_job
from services.api.problems import documented
from services.api.schemas import DATASET, MODEL, JobView

router = APIRouter(tags=["jobs"])


class CaptionedTrainingJobRequest(CaptionedTrainingSpec, JobTerms):
    """A training job of the captioned model as posted."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"dataset_id": DATASET, "modality": "cf", "steps": 4000, "batch_size": 32}]}
    )

    def spec(self) -> CaptionedTrainingSpec:
        """The part that is stored and computed."""
        return CaptionedTrainingSpec.model_validate(self.model_dump(exclude=set(TERMS)))


class CaptionedJobRequest(CaptionedSpec, JobTerms):
    """A job of the captioned model as posted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "model_id": MODEL,
                    "task": "text_to_image",
                    "texts": ["A fundus photograph with exudates"],
                    "images_per_text": 4,
                },
                {"model_id": MODEL, "task": "image_to_text", "dataset_id": DATASET, "captions": 3},
            ]
        }
    )

    def spec(self) -> CaptionedSpec:
        """The part that is stored and computed."""
        return CaptionedSpec.model_validate(self.model_dump(exclude=set(TERMS)))


@router.post(
    "/v1/captioned-training-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postCaptionedTrainingJob",
    summary="Post a training job of the captioned model",
    responses=documented(400, 403, 413, 422, 503),
)
def post_captioned_training_job(
    request: CaptionedTrainingJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the training of a model that draws images from captions and captions images. The data set was uploaded
    with `captions.jsonl`. The product is a model of family `captioned`."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)


@router.post(
    "/v1/captioned-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postCaptionedJob",
    summary="Post a job of the captioned model",
    responses=documented(400, 403, 413, 422, 503),
)
def post_captioned_job(
    request: CaptionedJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the drawing of texts, or the captioning of a data set's images, with a captioned model. The product is a
    report: the images in one archive, or the captions."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)
