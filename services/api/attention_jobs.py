"""Posting attention jobs. What they make is a report, served by ``reports``."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import ConfigDict

from cffa_core.jobs.spec import AttentionSpec
from services.api.access import IdempotencyKey, Owner, TheBackend
from services.api.job_terms import TERMS, JobTerms
from services.api.jobs import create_job
from services.api.problems import documented
from services.api.schemas import MODEL, JobView

router = APIRouter(tags=["jobs"])


class AttentionJobRequest(AttentionSpec, JobTerms):
    """An attention job as posted."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model_id": MODEL, "seed": 7, "index": 3, "kinds": ["cross", "self"], "tokens": ["vessels"]}]
        }
    )

    def spec(self) -> AttentionSpec:
        """The part that is stored and computed."""
        return AttentionSpec.model_validate(self.model_dump(exclude=set(TERMS)))


@router.post(
    "/v1/attention-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postAttentionJob",
    summary="Post an attention job",
    responses=documented(400, 403, 413, 422, 503),
)
def post_attention_job(
    request: AttentionJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue a look into the drawing of one pair: where each word of the prompts, or each point of the image, looked.
    The product is a report: the pair, heat maps over it, and the averaged maps as numbers."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)
