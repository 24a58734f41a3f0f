"""Captions of data sets and jobs of the captioned model over HTTP: what is taken in, and what may be posted on it."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.data.captions import parse_captions
from cffa_core.jobs.spec import Kind
from cffa_core.storage.manifest import read_verified
from services.api.access import Backend
from tests.api.driving import Worker, captions, good_upload, problem, zipped
from tests.api.test_folder_uploads import announce, pair_bytes, send

NAMES = ("m000", "m001", "m002")


def uploaded(client: TestClient, said: str | None) -> Any:
    upload = {"file": ("set.zip", good_upload(3, said), "application/zip")}
    return client.post("/v1/datasets", files=upload, data={"name": "A"})


def stored_names(backend: Backend, dataset_id: str) -> list[str]:
    """Names in the captions that a data set keeps."""
    info = backend.store.get_dataset("local", dataset_id).stored.files["captions.jsonl"]
    found, problems = parse_captions(read_verified(backend.objects, info).decode())
    assert not problems
    return list(found)


@pytest.fixture
def said(client: TestClient) -> dict[str, Any]:
    """A data set of three pairs with captions of their CF."""
    answer = uploaded(client, captions(*NAMES))
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


@pytest.fixture
def captioned_model(client: TestClient, worker: Worker, said: dict[str, Any]) -> str:
    body = {"dataset_id": said["id"], "steps": 2}
    assert client.post("/v1/captioned-training-jobs", json=body).status_code == 202
    return worker.train(Kind.CAPTIONED_TRAINING)


# --- captions of data sets ----------------------------------------------------------------------------------------


def test_captions_are_kept_and_belong_to_the_digest(client: TestClient, backend: Backend, said: dict[str, Any]) -> None:
    plain = uploaded(client, None).json()
    assert plain["digest"] != said["digest"]
    assert stored_names(backend, said["id"]) == list(NAMES)
    assert "captions.jsonl" not in backend.store.get_dataset("local", plain["id"]).stored.files
    assert client.get(f"/v1/datasets/{said['id']}/report").json()["captions"] == {"pairs": 3, "cf": 3, "fa": 0}
    assert "captions" not in client.get(f"/v1/datasets/{plain['id']}/report").json()


def test_captions_come_by_every_way_in(client: TestClient, backend: Backend) -> None:
    members = {**pair_bytes(), "captions.jsonl": captions("m000", "m001").encode()}
    upload = announce(client, members).json()
    send(client, upload, members)
    by_folder = client.post(upload["links"]["complete"]).json()
    for path, data in members.items():
        backend.objects.put_bytes(f"imports/local/eyes/{path}", data)
    by_prefix = client.post("/v1/datasets:import", json={"name": "A", "prefix": "eyes"}).json()
    zip_file = {"file": ("set.zip", zipped(members), "application/zip")}
    by_zip = client.post("/v1/datasets", files=zip_file, data={"name": "A"}).json()
    assert by_folder["digest"] == by_prefix["digest"] == by_zip["digest"]
    assert all(stored_names(backend, made["id"]) == ["m000", "m001"] for made in (by_folder, by_prefix, by_zip))


def test_bad_captions_are_named_by_line(client: TestClient) -> None:
    found = problem(uploaded(client, captions("m000", "m009") + "{\n"), 422, "invalid_dataset")
    errors = [(item["pointer"], item["code"]) for item in found["errors"]]
    assert errors == [("captions.jsonl:2", "bad_captions"), ("captions.jsonl:3", "bad_captions")]
    assert "no pair is named 'm009'" in found["errors"][0]["message"]


def test_a_version_keeps_the_captions_of_its_pairs(client: TestClient, backend: Backend, said: dict[str, Any]) -> None:
    made = client.post(f"/v1/datasets/{said['id']}/versions", json={"reject": ["m001"]}).json()
    assert stored_names(backend, made["id"]) == ["m000", "m002"]
    assert client.get(f"/v1/datasets/{made['id']}/report").json()["captions"] == {"pairs": 2, "cf": 2, "fa": 0}
    again = uploaded(client, captions("m000", "m001")).json()
    other = client.post(f"/v1/datasets/{again['id']}/versions", json={"reject": ["m001"]}).json()
    assert made["digest"] != other["digest"], "they hold the same images, and other captions"
    assert stored_names(backend, other["id"]) == ["m000"]


# --- trainings ----------------------------------------------------------------------------------------------------


def test_a_training_makes_a_model_of_its_own_family(client: TestClient, captioned_model: str, model_id: str) -> None:
    listed = {model["id"]: model["family"] for model in client.get("/v1/models").json()["items"]}
    assert listed == {captioned_model: "captioned", model_id: "pairs"}
    assert client.get(f"/v1/models/{captioned_model}").json()["method"] is None
    (job,) = client.get("/v1/jobs", params={"kind": "captioned_training"}).json()["items"]
    assert (job["state"], job["progress"]["total"]) == ("succeeded", 2)
    assert client.get(f"/v1/jobs/{job['id']}/checkpoints").json()["items"][0]["step"] == 2
    assert client.get(f"/v1/jobs/{job['id']}/metrics").json()["items"][0]["step"] == 1
    problem(client.get(f"/v1/jobs/{job['id']}/report"), 409, "conflict")


def test_a_training_needs_captions_of_its_modality(client: TestClient, said: dict[str, Any], dataset_id: str) -> None:
    for body, modality in (({"dataset_id": dataset_id}, "CF"), ({"dataset_id": said["id"], "modality": "fa"}, "FA")):
        found = problem(client.post("/v1/captioned-training-jobs", json=body), 422, "invalid_spec")
        (error,) = found["errors"]
        assert (error["pointer"], error["code"]) == ("/dataset_id", "no_captions")
        assert f"0 captions of its {modality} images" in error["message"] and "captions.jsonl" in error["message"]
    found = problem(
        client.post("/v1/captioned-training-jobs", json={"dataset_id": "ds_" + "0" * 20}), 422, "invalid_spec"
    )
    assert [(item["pointer"], item["code"]) for item in found["errors"]] == [("/dataset_id", "not_found")]


def test_a_running_training_makes_checkpoints_but_draws_no_samples(
    client: TestClient, worker: Worker, said: dict[str, Any]
) -> None:
    job = client.post("/v1/captioned-training-jobs", json={"dataset_id": said["id"]}).json()
    problem(client.post(f"/v1/jobs/{job['id']}:checkpoint"), 409, "conflict")
    worker.claim(Kind.CAPTIONED_TRAINING)
    assert client.post(f"/v1/jobs/{job['id']}:checkpoint").json()["wishes"] == ["checkpoint"]
    refused = problem(client.post(f"/v1/jobs/{job['id']}:sample"), 409, "conflict")
    assert "captioned job with its model" in refused["detail"]
    problem(client.get(f"/v1/jobs/{job['id']}/previews"), 409, "conflict")


# --- what is done with a model ------------------------------------------------------------------------------------


def refusal(client: TestClient, path: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    found = problem(client.post(path, json=body), 422, "invalid_spec")
    return [(item["pointer"], item["code"]) for item in found["errors"]]


def test_models_of_pairs_and_captioned_ones_are_not_mixed_up(
    client: TestClient, captioned_model: str, model_id: str, said: dict[str, Any]
) -> None:
    wrong = [("/model_id", "not_a_pair_model")]
    assert refusal(client, "/v1/generation-jobs", {"model_id": captioned_model, "count": 2}) == wrong
    assert refusal(client, "/v1/attention-jobs", {"model_id": captioned_model}) == wrong
    edit = {"model_id": captioned_model, "dataset_id": said["id"]}
    assert refusal(client, "/v1/edit-jobs", edit) == wrong
    drawn = {"model_id": model_id, "task": "text_to_image", "texts": ["a fundus"]}
    assert refusal(client, "/v1/captioned-jobs", drawn) == [("/model_id", "not_a_captioned_model")]


def test_images_of_a_data_set_or_of_texts(client: TestClient, captioned_model: str, dataset_id: str) -> None:
    body = {"model_id": captioned_model, "task": "image_to_text", "dataset_id": dataset_id}
    job = client.post("/v1/captioned-jobs", json=body).json()
    assert (job["kind"], job["state"], job["progress"]["total"]) == ("captioned", "queued", 0)
    assert job["links"]["report"].endswith("/report")
    gone = body | {"dataset_id": "ds_" + "0" * 20}
    assert refusal(client, "/v1/captioned-jobs", gone) == [("/dataset_id", "not_found")]
    assert refusal(client, "/v1/captioned-jobs", body | {"texts": ["a"]}) == [("", "value_error")]
    many = {"model_id": captioned_model, "task": "text_to_image", "texts": ["a"] * 11, "images_per_text": 1000}
    assert refusal(client, "/v1/captioned-jobs", many) == [("/images_per_text", "too_many_images")]
    used = problem(client.delete(f"/v1/datasets/{dataset_id}"), 409, "conflict")
    assert job["id"] in used["detail"]
