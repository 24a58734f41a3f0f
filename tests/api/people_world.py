"""A service with keys and several people on it, each with real things of their own; embedded, so it is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastapi.testclient import TestClient

from cffa_core.jobs.spec import Kind
from cffa_core.jobs.upload_rows import AnnouncedFile
from cffa_core.people.keys import Scope
from services.api.access import Backend
from tests.api.driving import Worker, captions, good_upload

BOOTSTRAP = "only-a-bootstrap-key-of-these-tests"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@dataclass
class World:
    """``client`` carries no key; ``keys`` are by person and scope; ``ids`` are what each parameter of a path names."""

    client: TestClient
    backend: Backend
    worker: Worker
    keys: dict[str, str] = field(default_factory=dict)
    ids: dict[str, list[str]] = field(default_factory=dict)

    def person(self, owner: str, *scopes: Scope) -> None:
        """Make an account with a key of each scope: ``anna-viewer``, ..."""
        self.backend.accounts.create_account(owner)
        for scope in scopes:
            _, self.keys[f"{owner}-{scope}"] = self.backend.accounts.create_key(owner, name=f"{owner}s", scope=scope)

    def ask(self, who: str, method: str, path: str, **options: Any) -> Any:
        """Send a request with somebody's key."""
        return self.client.request(method, path, headers=bearer(self.keys[who]), **options)

    def made(self, who: str, path: str, **options: Any) -> Any:
        """Post as somebody; it must succeed."""
        answer = self.ask(who, "POST", path, **options)
        assert answer.status_code in (201, 202), answer.text
        return answer.json()

    def fill(self, who: str) -> None:
        """One of everything that an owner can have; their ids go to ``ids``."""
        owner = who.rpartition("-")[0]
        store = self.backend.store
        said = good_upload(3, captions("m000", "m001"))
        upload = {"files": {"file": ("set.zip", said, "application/zip")}, "data": {"name": "theirs"}}
        dataset = self.made(who, "/v1/datasets", **upload)["id"]
        training = self.made(who, "/v1/training-jobs", json={"dataset_id": dataset, "steps": 2})["id"]
        model = self.worker.train()
        body = {"model_id": model, "count": 2, "part_size": 2, "seed": 7}
        generation = self.made(who, "/v1/generation-jobs", json=body)["id"]
        self.worker.make_part()
        self.worker.make_part()
        body = {"generation_job_id": generation, "reference_dataset_id": dataset}
        evaluation = self.made(who, "/v1/evaluation-jobs", json=body)["id"]
        attention = self.made(who, "/v1/attention-jobs", json={"model_id": model})["id"]
        self.worker.compute(Kind.ATTENTION, {"report.json": b"{}"})
        body = {"dataset_id": dataset, "steps": 2}
        captioned_training = self.made(who, "/v1/captioned-training-jobs", json=body)["id"]
        captioned_model = self.worker.train(Kind.CAPTIONED_TRAINING)
        body = {"model_id": captioned_model, "task": "image_to_text", "dataset_id": dataset}
        captioned = self.made(who, "/v1/captioned-jobs", json=body)["id"]
        edit = self.made(who, "/v1/edit-jobs", json={"dataset_id": dataset, "edits": [{"text": "disc"}]})["id"]
        folder = store.add_upload(
            owner, store.new_id("up"), "folder", [AnnouncedFile("cf/a.png", 3, "uploads/a")], {}, seconds=600
        )
        hook = self.backend.hooks.create(owner, "https://example.org/hook", []).hook
        delivery = self.backend.hooks.trial(owner, hook.id)
        key = self.made(who, "/v1/api-keys", json={"name": "another", "scope": "viewer"})["id"]
        self.ids = {
            "dataset_id": [dataset],
            "job_id": [training, generation, evaluation, attention, captioned_training, captioned, edit],
            "model_id": [model, captioned_model],
            "upload_id": [folder.id],
            "webhook_id": [hook.id],
            "delivery_id": [delivery.id],
            "key_id": [key],
            "owner": [owner],
            "index": ["0"],
            "number": ["0"],
            "modality": ["cf"],
            "name": ["report.json"],
        }
