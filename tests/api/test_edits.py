"""Edit jobs over HTTP: posted on a data set or a job, refused with every reason; their pairs, masks and archives."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.jobs.records import Claim, NewModel, StoredFiles
from cffa_core.jobs.spec import EditSpec, Kind
from cffa_core.jobs.state import UnitKind
from cffa_core.recipes.archive import merge_archives, verify_archive, write_part_archive
from cffa_core.storage.base import part_key, result_key
from services.api.access import Backend
from services.api.app import create_app
from tests.api.conftest import fresh_home
from tests.api.driving import URL, Worker, good_upload, png, problem, sha256, zipped

ADD = [{"text": "haemorrhages"}]


@pytest.fixture
def pairs(client: TestClient) -> str:
    """A data set of the three pairs m000 to m002."""
    return uploaded(client, 3)


def uploaded(client: TestClient, count: int) -> str:
    files = {"file": ("set.zip", good_upload(count), "application/zip")}
    answer = client.post("/v1/datasets", files=files, data={"name": "A"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def posted(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/edit-jobs", json={"edits": ADD, "part_size": 2} | body)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def refused(client: TestClient, **body: Any) -> dict[str, str]:
    """Pointer and code of every problem of a refused post."""
    found = problem(client.post("/v1/edit-jobs", json={"edits": ADD} | body), 422, "invalid_spec")
    return {item["pointer"]: item["code"] for item in found["errors"]}


def make_part(worker: Worker) -> Claim:
    """Claim and finish the next unit of an edit job with pictures that nobody edited."""
    claim = worker.claim(Kind.EDIT)
    spec = claim.spec
    assert isinstance(spec, EditSpec)
    if claim.kind is UnitKind.FINALIZE:
        parts = worker.store.parts(claim.owner, claim.job_id, kind=UnitKind.PART)
        path = worker.folder / f"{claim.job_id}.zip"
        merge_archives((worker.folder / part.unit_id / "pairs.zip" for part in parts), path, {"edited": True})
        stored = worker.objects.put_file(result_key(claim.job_id, "finalize", claim.attempt, "archive.zip"), path)
        result = {"manifest": {"sha256": "ef" * 32}}
        worker.store.commit(claim, StoredFiles({"archive.zip": stored}), {"pairs": spec.count}, job_result=result)
        return claim
    folder = worker.folder / claim.unit_id
    entries = []
    for index in spec.part_range(claim.index):
        entry: dict[str, Any] = {
            "index": index,
            "seed": index,
            "source": {"dataset": "ab" * 32, "name": f"m{index:03d}"},
            "alignment": {"ridge_correlation": 0.5},
            "alignment_before": {"ridge_correlation": 0.6},
            "mask_share": 0.25,
        }
        for name in ("cf", "fa", "mask", "sheet"):
            data = png(index, colour=name in ("cf", "sheet"))
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / f"{index:06d}.png").write_bytes(data)
            entry[name] = {"name": f"{name}/{index:06d}.png", "size": len(data), "sha256": sha256(data)}
        entries.append(entry)
    (folder / "part.json").write_text(json.dumps({"pairs": entries}))
    listing = write_part_archive(folder, folder / "pairs.zip", {"edited": True})
    (folder / "part.json").write_text(json.dumps(listing))
    stored_files = {
        name: worker.objects.put_file(part_key(claim.job_id, claim.index, claim.attempt, name), folder / name)
        for name in ("pairs.zip", "part.json")
    }
    worker.store.commit(claim, StoredFiles(stored_files), {"pairs": [entry["index"] for entry in entries]})
    return claim


def test_an_edit_counts_the_pairs_of_its_data_set(client: TestClient, pairs: str) -> None:
    job = posted(client, dataset_id=pairs)
    assert (job["kind"], job["state"], job["queue_position"]) == ("edit", "queued", 1)
    assert (job["spec"]["count"], job["counts"]["requested"], job["progress"]["total"]) == (3, 3, 3)
    assert set(job["links"]) == {"self", "events", "metrics", "pairs", "archives"}
    some = posted(client, dataset_id=pairs, names=["m002"], count=1)
    assert (some["spec"]["count"], some["spec"]["names"]) == (1, ["m002"])
    listed = client.get("/v1/jobs", params={"kind": "edit", "dataset_id": pairs}).json()["items"]
    assert [item["id"] for item in listed] == [some["id"], job["id"]]
    problem(client.delete(f"/v1/datasets/{pairs}"), 409, "conflict")


def test_a_data_set_of_one_pair_is_enough(client: TestClient) -> None:
    assert posted(client, dataset_id=uploaded(client, 1))["spec"]["count"] == 1


def test_an_area_is_a_mask_that_came_with_each_pair(client: TestClient) -> None:
    members = {f"masks/here/m{index:03d}.png": png(index, colour=False) for index in range(2)}
    with zipfile.ZipFile(io.BytesIO(good_upload(3))) as archive:
        members |= {name: archive.read(name) for name in archive.namelist()}
    files = {"file": ("set.zip", zipped(members), "application/zip")}
    pairs = client.post("/v1/datasets", files=files, data={"name": "A"}).json()["id"]
    assert refused(client, dataset_id=pairs, area="here") == {"/area": "missing_mask"}
    assert refused(client, dataset_id=pairs, area="there", names=["m000"]) == {"/area": "missing_mask"}
    assert posted(client, dataset_id=pairs, area="here", names=["m000", "m001"])["spec"]["count"] == 2


def test_every_fault_of_a_post_is_named_at_once(client: TestClient, pairs: str) -> None:
    nobody = {"model_id": "mdl_" + "0" * 20, "dataset_id": "ds_" + "0" * 20}
    assert refused(client, **nobody) == {"/model_id": "not_found", "/dataset_id": "not_found"}
    unknown = {"dataset_id": pairs, "names": ["m000", "m7", "m8"], "model_id": nobody["model_id"]}
    assert refused(client, **unknown) == {"/model_id": "not_found", "/names": "no_such_pair"}
    assert refused(client, dataset_id=pairs, count=2) == {"/count": "count"}
    assert refused(client, generation_job_id="job_" + "0" * 20) == {"/generation_job_id": "not_found"}
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({}, ""),
        ({"names": ["m000", "m000"]}, ""),
        ({"pair_indices": [0]}, ""),
        ({"area": "No/Mask"}, "/area"),
        ({"generation_job_id": "job_" + "0" * 20}, ""),
        ({"mask": "both"}, "/mask"),
        ({"edits": [{"text": ""}]}, "/edits/0/text"),
        ({"edits": [{"text": "a", "cooldown": 2, "warmup": 2}]}, "/edits/0"),
        ({"edits": [{"text": "a", "warmup": 45}]}, ""),
        ({"resolution": 100}, "/resolution"),
        ({"colour": "red"}, "/colour"),
    ],
)
def test_bad_bodies_are_refused_when_posted(client: TestClient, body: dict[str, Any], pointer: str) -> None:
    known = {"dataset_id": "ds_" + "0" * 20} if body else {}
    assert list(refused(client, **known, **body)) == [pointer]


def with_card(worker: Worker, client: TestClient, dataset_id: str, **card: Any) -> str:
    """A model in the record whose card says this."""
    assert client.post("/v1/training-jobs", json={"dataset_id": dataset_id, "steps": 2}).status_code == 202
    claim = worker.claim(Kind.TRAINING)
    key = result_key(claim.job_id, "train", claim.attempt, "model/model.json")
    stored = StoredFiles({"model/model.json": worker.objects.put_bytes(key, b"{}")})
    worker.store.commit(claim, stored, {})
    made = NewModel(digest=sha256(json.dumps(card).encode()), card=card, stored=stored)
    job = worker.store.commit(worker.claim(Kind.TRAINING), StoredFiles({}), {}, job_result={}, model=made)
    assert job.result is not None
    return str(job.result["model_id"])


@pytest.mark.parametrize(
    ("card", "code"),
    [
        ({"family": "captioned"}, "not_a_pair_model"),
        ({"method": "controlnet"}, "cannot_edit"),
        ({"method": "side_by_side"}, "cannot_edit"),
        ({"method": "dual_unet", "settings": {"modalities": ["cf"]}}, "cannot_edit"),
    ],
)
def test_models_that_cannot_edit(
    client: TestClient, worker: Worker, pairs: str, card: dict[str, Any], code: str
) -> None:
    model = with_card(worker, client, pairs, **card)
    assert refused(client, dataset_id=pairs, model_id=model) == {"/model_id": code}


def test_models_that_can_edit(client: TestClient, worker: Worker, pairs: str) -> None:
    for method in ("dual_unet", "shared_attention"):
        model = with_card(worker, client, pairs, method=method, settings={"modalities": ["cf", "fa"]})
        assert posted(client, dataset_id=pairs, model_id=model)["spec"]["model_id"] == model


def test_pairs_of_a_job_are_edited_once_it_has_succeeded(client: TestClient, worker: Worker, generation: str) -> None:
    source = {"generation_job_id": generation}
    assert refused(client, **source) == {"/generation_job_id": "not_succeeded"}
    for _ in range(4):
        worker.make_part()
    job = posted(client, **source, pair_indices=[4, 0, 2])
    assert (job["spec"]["count"], job["spec"]["pair_indices"]) == (3, [4, 0, 2])
    assert posted(client, **source)["spec"]["count"] == 5
    assert refused(client, **source, pair_indices=[4, 5]) == {"/pair_indices": "no_such_pair"}
    training = client.get("/v1/jobs", params={"kind": "training"}).json()["items"][0]["id"]
    assert refused(client, generation_job_id=training) == {"/generation_job_id": "not_a_generation_job"}


def test_pairs_with_masks_and_sheets_are_there_while_the_job_runs(
    client: TestClient, worker: Worker, pairs: str
) -> None:
    job = posted(client, dataset_id=pairs)["id"]
    problem(client.get(f"/v1/jobs/{job}/pairs/0"), 409, "conflict")
    make_part(worker)
    here = f"/v1/jobs/{job}"
    assert client.get(here).json()["counts"]["generated"] == 2
    items = client.get(f"{here}/pairs").json()["items"]
    assert [(pair["index"], pair["mask_share"], pair["source"]["name"]) for pair in items] == [
        (0, 0.25, "m000"),
        (1, 0.25, "m001"),
    ]
    for name in ("cf", "fa", "mask", "sheet"):
        image = client.get(items[1][name]["url"])
        assert image.content == png(1, colour=name in ("cf", "sheet")), name
        assert hashlib.sha256(image.content).hexdigest() == items[1][name]["sha256"]
    assert items[0]["alignment_before"] == {"ridge_correlation": 0.6}
    assert client.get(f"{here}/rejects").json()["items"] == client.get(f"{here}/exhausted").json()["items"] == []
    again = problem(client.post(f"{here}/pairs/0:regenerate"), 409, "conflict")
    assert "edit job" in again["detail"]
    export = client.post(f"{here}/exports", json={"form": "webdataset"})
    assert (export.status_code, export.json()["spec"]["parts"]) == (202, [[0, 0]])
    dicom = client.post(f"{here}/exports", json={"form": "dicom"})
    assert [(item["pointer"], item["code"]) for item in problem(dicom, 422, "invalid_spec")["errors"]] == [
        ("/form", "not_synthetic")
    ]
    asked = client.post(f"{here}/exports", json={"selection": {"accepted_only": True}})
    assert [item["code"] for item in problem(asked, 422, "invalid_spec")["errors"]] == ["no_gate"]


def test_the_whole_archive_and_an_edit_of_the_edit(client: TestClient, worker: Worker, pairs: str) -> None:
    job = posted(client, dataset_id=pairs)["id"]
    for _ in range(3):
        make_part(worker)
    done = client.get(f"/v1/jobs/{job}").json()
    assert (done["state"], done["counts"]["generated"], done["progress"]["current"]) == ("succeeded", 3, 3)
    archives = client.get(f"/v1/jobs/{job}/archives").json()
    assert [part["pairs"] for part in archives["parts"]] == [2, 1] and archives["whole"]["pairs"] == 3
    data = client.get(archives["whole"]["url"]).content
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert len(archive.namelist()) == 4 * 3 + 1
        (worker.folder / "whole.zip").write_bytes(data)
    assert [pair["mask_share"] for pair in verify_archive(worker.folder / "whole.zip")["pairs"]] == [0.25] * 3
    assert posted(client, generation_job_id=job, pair_indices=[2])["spec"]["count"] == 1
    twice = posted(client, generation_job_id=job)["id"]
    dicom = client.post(f"/v1/jobs/{twice}/exports", json={"form": "dicom"})
    assert [item["code"] for item in problem(dicom, 422, "invalid_spec")["errors"]] == ["not_synthetic"]
    measured = client.post("/v1/evaluation-jobs", json={"generation_job_id": job, "reference_dataset_id": pairs})
    assert measured.status_code == 202, measured.text


def test_a_generated_pair_has_no_mask(client: TestClient, worker: Worker, generation: str) -> None:
    worker.make_part()
    problem(client.get(f"/v1/jobs/{generation}/pairs/0/mask.png"), 404, "not_found")
    assert client.get(f"/v1/jobs/{generation}/pairs/0").json()["mask"] is None


def test_the_pairs_of_an_edit_count_for_the_quota(tmp_path: Path, migrated: Path) -> None:
    settings = fresh_home(tmp_path, migrated).model_copy(update={"quota_pairs": 4})
    with TestClient(create_app(settings), base_url=URL) as client:
        pairs = uploaded(client, 3)
        posted(client, dataset_id=pairs)
        over = client.post("/v1/edit-jobs", json={"dataset_id": pairs, "edits": ADD, "names": ["m000", "m001"]})
        assert "generation and edit jobs" in problem(over, 403, "quota_exceeded")["detail"]
        assert posted(client, dataset_id=pairs, names=["m000"])["spec"]["count"] == 1


def test_the_same_key_makes_one_edit(client: TestClient, pairs: str) -> None:
    first, again, other = (
        client.post(
            "/v1/edit-jobs",
            json={"dataset_id": pairs, "edits": [{"text": text}]},
            headers={"Idempotency-Key": "k"},
        )
        for text in ("disc", "disc", "cup")
    )
    assert first.json()["id"] == again.json()["id"] and again.headers["idempotency-replayed"] == "true"
    problem(other, 422, "idempotency_key_reused")


def test_an_expired_job_has_no_pairs_to_edit(client: TestClient, backend: Backend, worker: Worker, pairs: str) -> None:
    job = posted(client, dataset_id=pairs, retention_days=1e-9)["id"]
    for _ in range(3):
        make_part(worker)
    for expired in backend.store.expirable():
        backend.store.expire_job(expired)
    assert refused(client, generation_job_id=job) == {"/generation_job_id": "expired"}
