"""Models: products of training jobs, with their cards and files."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from services.api.access import ModelId, Owner, TheBackend
from services.api.paging import PageSize, PageToken
from services.api.problems import documented
from services.api.product_schemas import ModelDetail, ModelList, ModelView, StoredFileView

router = APIRouter(tags=["models"])


@router.get(
    "/v1/models", operation_id="listModels", summary="List models, newest first", responses=documented(422, 503)
)
def list_models(
    backend: TheBackend,
    owner: Owner,
    job_id: str | None = None,
    page_size: PageSize = 50,
    page_token: PageToken = None,
) -> ModelList:
    """One page of models; `job_id` keeps the one that a training job made."""
    page = backend.store.list_models(owner, job_id=job_id, page_size=page_size, page_token=page_token)
    return ModelList(items=[ModelView.of(model) for model in page.items], next_page_token=page.next_token)


@router.get("/v1/models/{model_id}", operation_id="getModel", summary="Get a model", responses=documented(404, 503))
def get_model(model_id: ModelId, backend: TheBackend, owner: Owner) -> ModelDetail:
    """A model and signed links to its files."""
    model = backend.store.get_model(owner, model_id)
    files = [
        StoredFileView(
            name=name,
            bytes=info.size,
            sha256=info.sha256,
            url=backend.objects.download_url(
                info.key,
                expires_seconds=backend.settings.blob_url_ttl,
                filename=name.rsplit("/", 1)[-1],
                sha256=info.sha256,
            ),
        )
        for name, info in sorted(model.stored.files.items())
    ]
    return ModelDetail(**ModelView.of(model).model_dump(), files=files)


@router.get(
    "/v1/models/{model_id}/card", operation_id="getModelCard", summary="A model's card", responses=documented(404, 503)
)
def get_card(model_id: ModelId, backend: TheBackend, owner: Owner) -> dict[str, Any]:
    """How the model was made: method, base, settings, data set digest, validation."""
    return backend.store.get_model(owner, model_id).card
