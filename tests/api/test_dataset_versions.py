"""Versions of a data set: rejected pairs, splits by eye, shared images, and what deleting leaves."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from services.api.access import Backend
from tests.api.driving import png, problem, zipped


@pytest.fixture
def parent(client: TestClient) -> dict[str, Any]:
    """Eight pairs of four eyes."""
    members = {}
    for index in range(8):
        name = f"p{index % 4}_{index}"
        members |= {f"cf/{name}.png": png(index), f"fa/{name}.png": png(index, colour=False)}
    form = {"name": "clinic A", "eye_pattern": "^p[0-9]"}
    answer = client.post("/v1/datasets", files={"file": ("s.zip", zipped(members), "application/zip")}, data=form)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def version(client: TestClient, dataset: dict[str, Any], **asked: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/datasets/{dataset['id']}/versions", json=asked)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def names(client: TestClient, dataset: dict[str, Any]) -> list[str]:
    return [pair["name"] for pair in client.get(f"/v1/datasets/{dataset['id']}/pairs").json()["items"]]


def test_a_version_leaves_rejected_pairs_out_and_shares_the_rest(
    client: TestClient, backend: Backend, parent: dict[str, Any]
) -> None:
    before = set(backend.objects.list("datasets/"))
    made = version(client, parent, reject=["p0_0", "p3_7"])
    assert (made["version"], made["parent_id"], made["pairs"]) == (2, parent["id"], 6)
    assert made["digest"] != parent["digest"]
    assert names(client, made) == [name for name in names(client, parent) if name not in ("p0_0", "p3_7")]
    assert len(set(backend.objects.list("datasets/")) - before) == 1
    assert client.get(f"/v1/datasets/{parent['id']}").json()["pairs"] == 8
    report = client.get(f"/v1/datasets/{made['id']}/report").json()
    assert report["counts"]["pairs"] == len(report["pairs"]) == 6
    assert report["digest"] == made["digest"]


def test_a_digest_says_which_pairs_and_which_split(client: TestClient, parent: dict[str, Any]) -> None:
    split = {"train": 2, "validation": 1, "test": 1}
    digests = [
        version(client, parent, **asked)["digest"]
        for asked in (
            {"split": {**split, "seed": 1}},
            {"split": {**split, "seed": 1}, "name": "other name"},
            {"split": {**split, "seed": 2}},
            {"split": {**split, "seed": 1}, "reject": ["p0_0"]},
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_no_split_divides_an_eye(client: TestClient, backend: Backend, parent: dict[str, Any]) -> None:
    for seed in range(4):
        made = version(client, parent, split={"train": 0.5, "validation": 0.25, "test": 0.25, "seed": seed})
        assert made["split"] == {"train": 4, "validation": 2, "test": 2}
        split = backend.store.get_dataset("local", made["id"]).split
        assert split is not None
        eyes = [{name[:2] for name in part} for part in split.values()]
        assert sum(len(part) for part in eyes) == len(set.union(*eyes)) == 4
    grandchild = version(client, made, reject=[split["train"][0]])
    assert (grandchild["version"], grandchild["split"]) == (3, {"train": 3, "validation": 2, "test": 2})


def test_no_split_divides_a_known_patient(client: TestClient, backend: Backend) -> None:
    members = {}
    for index in range(6):
        name = f"p{index // 2}_{'OD' if index % 2 else 'OS'}"
        members |= {f"cf/{name}.png": png(index), f"fa/{name}.png": png(index, colour=False)}
    form = {"name": "A", "patient_pattern": "^(p[0-9])_"}
    zip_file = {"file": ("s.zip", zipped(members), "application/zip")}
    parent = client.post("/v1/datasets", files=zip_file, data=form).json()
    for seed in range(4):
        made = version(client, parent, split={"train": 1, "validation": 1, "test": 1, "seed": seed})
        split = backend.store.get_dataset("local", made["id"]).split
        assert split is not None and [len({name[:2] for name in part}) for part in split.values()] == [1, 1, 1]
        assert [len(part) for part in split.values()] == [2, 2, 2]
    left = version(client, made, reject=["p0_OD"])
    counts = client.get(f"/v1/datasets/{left['id']}/report").json()["counts"]
    assert (counts["pairs"], counts["patients"]) == (5, 3)
    divided = {"split": {"train": ["p0_OD", "p1_OS"], "test": ["p0_OS"]}}
    body = problem(client.post(f"/v1/datasets/{parent['id']}/versions", json=divided), 422, "invalid_spec")
    assert [(item["pointer"], item["code"]) for item in body["errors"]] == [("/split/test", "patient_in_two_parts")]
    assert "'p0'" in body["errors"][0]["message"]


def twins(client: TestClient) -> dict[str, Any]:
    """Both eyes of three patients, whom nothing tells, and one pair more."""
    names = [*(f"p{index}_{side}" for index in range(3) for side in ("OD", "OS")), "x9"]
    members = {}
    for index, name in enumerate(names):
        members |= {f"cf/{name}.png": png(index), f"fa/{name}.png": png(index, colour=False)}
    zip_file = {"file": ("s.zip", zipped(members), "application/zip")}
    made: dict[str, Any] = client.post("/v1/datasets", files=zip_file, data={"name": "A"}).json()
    return made


def test_a_version_tells_the_patients(client: TestClient) -> None:
    parent = twins(client)
    told = version(client, parent, patient_pattern="^(p[0-9])_")
    assert told["digest"] != version(client, parent)["digest"]
    pairs = client.get(f"/v1/datasets/{told['id']}/pairs").json()["items"]
    assert [pair["patient"] for pair in pairs] == ["p0", "p0", "p1", "p1", "p2", "p2", None]
    report = client.get(f"/v1/datasets/{told['id']}/report").json()
    assert report["counts"]["patients"] == 3 and report["pairs"][0]["patient"] == "p0"
    assert [(item["code"], "x9" in item["message"]) for item in report["warnings"]] == [("without_patient", True)]
    assert {pair["patient"] for pair in client.get(f"/v1/datasets/{parent['id']}/pairs").json()["items"]} == {None}
    again = version(client, told, patient_pattern="^(x9)")
    pairs = client.get(f"/v1/datasets/{again['id']}/pairs").json()["items"]
    assert [pair["patient"] for pair in pairs] == ["p0", "p0", "p1", "p1", "p2", "p2", "x9"]
    assert client.get(f"/v1/datasets/{again['id']}/report").json()["warnings"] == []


def test_a_locked_split_that_would_divide_a_patient_wants_another(client: TestClient, backend: Backend) -> None:
    parent = twins(client)
    divided = version(client, parent, split={"train": ["p0_OD", "p1_OD", "p1_OS"], "test": ["p0_OS", "x9"]})
    url, told = f"/v1/datasets/{divided['id']}/versions", {"patient_pattern": "^(p[0-9])_"}
    body = problem(client.post(url, json=told), 422, "invalid_spec")
    assert [(item["pointer"], item["code"]) for item in body["errors"]] == [("/split/test", "patient_in_two_parts")]
    assert "give a new split too" in body["detail"]
    # Without the pair that is in the other part nobody is divided, and with a split of its own nobody either.
    left = version(client, divided, **told, reject=["p0_OS"])
    assert left["split"] == {"train": 3, "validation": 0, "test": 1}
    made = version(client, divided, **told, split={"train": 0.5, "test": 0.5})
    split = backend.store.get_dataset("local", made["id"]).split
    assert split is not None and not {name[:2] for name in split["train"]} & {name[:2] for name in split["test"]}


@pytest.mark.parametrize(
    ("asked", "pointer", "code"),
    [
        ({"reject": ["nobody"]}, "/reject/0", "unknown_pair"),
        ({"reject": [f"p{i % 4}_{i}" for i in range(8)]}, "/reject", "too_few_pairs"),
        ({"split": {"train": ["p0"], "test": ["p0"]}}, "/split/test", "eye_in_two_parts"),
        ({"split": {"train": ["p0"], "test": ["p9"]}}, "/split/test", "unknown_eye"),
        ({"auto_register": ["nobody"]}, "/auto_register/0", "unknown_pair"),
        ({"patient_pattern": "("}, "/patient_pattern", "bad_patient_pattern"),
        ({"patient_pattern": "a\x07"}, "/patient_pattern", "bad_pattern"),
        ({"patient_pattern": "p1_([0-9])"}, "/patient_pattern", "eye_of_two_patients"),
    ],
)
def test_versions_that_cannot_be(
    client: TestClient, parent: dict[str, Any], asked: dict[str, Any], pointer: str, code: str
) -> None:
    body = problem(client.post(f"/v1/datasets/{parent['id']}/versions", json=asked), 422, "invalid_spec")
    assert [(item["pointer"], item["code"]) for item in body["errors"]] == [(pointer, code)]


def test_pairs_are_known_by_the_names_they_came_with(client: TestClient) -> None:
    """Blanks and letters of other alphabets are no safe names; patterns and people speak of the names all the same."""
    called = ["patient 7 OD", "patient 7 OS", "眼 1"]
    members = {}
    for index, name in enumerate(called):
        members |= {f"cf/{name}.png": png(index), f"fa/{name}.png": png(index, colour=False)}
    form = {"name": "clinic B", "eye_pattern": "^patient ([0-9]+) (O[DS])$", "patient_pattern": "^patient ([0-9]+) "}
    answer = client.post("/v1/datasets", files={"file": ("s.zip", zipped(members), "application/zip")}, data=form)
    made = answer.json()
    pairs = client.get(f"/v1/datasets/{made['id']}/pairs").json()["items"]
    assert [pair["original_name"] for pair in pairs] == called
    assert [pair["eye"] for pair in pairs[:2]] == ["7OD", "7OS"]
    assert [pair["patient"] for pair in pairs] == ["7", "7", None]
    warnings = client.get(f"/v1/datasets/{made['id']}/report").json()["warnings"]
    assert [warning["code"] for warning in warnings] == ["renamed", "without_patient"]
    told = version(client, made, reject=["眼 1"], patient_pattern="^patient (7) ")
    assert names(client, told) == [pair["name"] for pair in pairs[:2]]
    assert (
        version(client, made, reject=[pairs[2]["name"]])["digest"] == version(client, made, reject=["眼 1"])["digest"]
    )


@pytest.mark.parametrize(
    ("asked", "pointers"),
    [
        ({"split": 5}, ["/split"]),
        ({"split": {"train": 0, "validation": 0.5}}, ["/split/train"]),
        ({"split": {"validation": ["p1"]}}, ["/split/train"]),
        ({"split": {"train": [1], "seed": 3}}, ["/split/train/0", "/split/seed"]),
        ({"auto_register": "all"}, ["/auto_register", "/auto_register"]),
    ],
)
def test_what_is_wrong_is_pointed_at_in_the_body(
    client: TestClient, parent: dict[str, Any], asked: dict[str, Any], pointers: list[str]
) -> None:
    body = problem(client.post(f"/v1/datasets/{parent['id']}/versions", json=asked), 422, "invalid_spec")
    assert [item["pointer"] for item in body["errors"]] == pointers


def test_the_same_key_makes_one_version(client: TestClient, parent: dict[str, Any]) -> None:
    url, headers = f"/v1/datasets/{parent['id']}/versions", {"Idempotency-Key": "k"}
    made = [client.post(url, json={"reject": ["p0_0"]}, headers=headers).json()["id"] for _ in range(2)]
    assert made[0] == made[1]
    problem(client.post(url, json={"reject": ["p1_1"]}, headers=headers), 422, "idempotency_key_reused")


def test_deleting_keeps_what_other_versions_share(client: TestClient, backend: Backend, parent: dict[str, Any]) -> None:
    made = version(client, parent, reject=["p0_0"])
    assert client.delete(f"/v1/datasets/{parent['id']}").status_code == 204
    problem(client.get(f"/v1/datasets/{parent['id']}"), 404, "not_found")
    for pair in client.get(f"/v1/datasets/{made['id']}/pairs").json()["items"]:
        assert client.get(pair["cf_url"]).status_code == client.get(pair["fa_url"]).status_code == 200
    kept = list(backend.objects.list("datasets/"))
    assert len(kept) == 7 * 4 + 1 and not any("p0_0" in key for key in kept)
    assert client.delete(f"/v1/datasets/{made['id']}").status_code == 204
    assert list(backend.objects.list("datasets/")) == []


def test_a_data_set_in_use_stays(client: TestClient, parent: dict[str, Any]) -> None:
    job = client.post("/v1/training-jobs", json={"dataset_id": parent["id"], "steps": 2}).json()["id"]
    body = problem(client.delete(f"/v1/datasets/{parent['id']}"), 409, "conflict")
    assert job in body["detail"]
    assert client.post(f"/v1/jobs/{job}:cancel").status_code == 200
    assert client.delete(f"/v1/datasets/{parent['id']}").status_code == 204


def test_a_reference_is_a_part_of_a_split(client: TestClient, parent: dict[str, Any]) -> None:
    made = version(client, parent, split={"train": ["p0", "p1"], "test": ["p2"]})
    body = {"pairs_dataset_id": parent["id"], "reference_dataset_id": made["id"], "train_dataset_id": made["id"]}
    problem(client.post("/v1/evaluation-jobs", json=body), 422, "invalid_spec")
    refused = problem(
        client.post("/v1/evaluation-jobs", json=body | {"reference_split": "validation"}), 422, "invalid_spec"
    )
    assert [item["pointer"] for item in refused["errors"]] == ["/reference_split"]
    assert client.post("/v1/evaluation-jobs", json=body | {"reference_split": "test"}).status_code == 202
