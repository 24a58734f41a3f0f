"""Edit jobs: pairs of a data set or of an earlier job, changed by text under one mask for both images.

What they make is served where generated pairs are (``pairs``, ``archives``, ``exports``).
"""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import ConfigDict

from cffa_core.jobs.spec import EditSpec
from services.api.access import IdempotencyKey, Owner, TheBackend
from services.api.job_terms import TERMS, JobTerms
from services.api.jobs import create_job
from services.api.problems import documented
from services.api.schemas import DATASET, JOB, MODEL, JobView

router = APIRouter(tags=["jobs"])


class EditJobRequest(EditSpec, JobTerms):
    """An edit job as posted. ``count`` is filled in; one that is given must be the number of pairs there are."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "dataset_id": DATASET,
                    "model_id": MODEL,
                    "edits": [{"text": "haemorrhages"}],
                    "mask": "union",
                    "names": ["m024"],
                },
                {"generation_job_id": JOB, "edits": [{"text": "microaneurysms", "direction": "remove"}], "steps": 50},
            ]
        }
    )

    def spec(self) -> EditSpec:
        """The part that is stored and computed."""
        return EditSpec.model_validate(self.model_dump(exclude=set(TERMS)))


@router.post(
    "/v1/edit-jobs",
    status_code=202,
    response_model=JobView,
    operation_id="postEditJob",
    summary="Post an edit job",
    responses=documented(400, 403, 413, 422, 503),
)
def post_edit_job(
    request: EditJobRequest, backend: TheBackend, owner: Owner, idempotency_key: IdempotencyKey = None
) -> Response:
    """Queue the editing of pairs by text: things are added or removed in both images, under one mask. The pairs are
    those of a data set (one pair is enough), or of a succeeded generation or edit job. The products are new pairs, each
    with its mask and a sheet of before and after; parts of the result can be downloaded while the job runs."""
    return create_job(backend, owner, request.spec(), request, idempotency_key)
