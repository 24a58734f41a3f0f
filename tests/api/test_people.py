"""Accounts, keys, limits and the audit log over HTTP, in the embedded service with keys switched on."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr

from cffa_core.errors import InvalidSettings, QuotaExceeded, StorageUnavailable
from cffa_core.jobs.service_tables import post_keys
from cffa_core.jobs.store import JobStore
from cffa_core.people.keys import Scope, new_key
from cffa_core.settings import Settings
from services.api.access import Backend
from services.api.app import _remove_what_nobody_needs, create_app
from tests.api.conftest import fresh_home
from tests.api.driving import URL, Worker, good_upload, problem
from tests.api.people_world import BOOTSTRAP, World, bearer

ROOT, ANNA, VIEWER = "root", "anna-researcher", "anna-viewer"


def keyed(settings: Settings, **more: Any) -> FastAPI:
    return create_app(settings.model_copy(update={"require_keys": True, "bootstrap_key": SecretStr(BOOTSTRAP)} | more))


def opened(app: FastAPI) -> TestClient:
    return TestClient(app, base_url=URL, raise_server_exceptions=False)


@pytest.fixture
def world(tmp_path: Path, migrated: Path) -> Iterator[World]:
    app = keyed(fresh_home(tmp_path, migrated))
    with opened(app) as client:
        yield peopled(client, app.state.backend, tmp_path)


def peopled(client: TestClient, backend: Backend, folder: Path) -> World:
    made = World(client, backend, Worker(backend.store, backend.objects, folder / "worker"))
    made.keys[ROOT] = BOOTSTRAP
    made.person("anna", Scope.VIEWER, Scope.RESEARCHER)
    return made


def actions(world: World, **filters: str) -> list[tuple[str, str, str | None]]:
    items = world.ask(ROOT, "GET", "/v1/audit", params=filters).json()["items"]
    return [(item["owner"], item["action"], item["target"]) for item in items]


def test_without_keys_everything_is_local_and_an_admins(client: TestClient) -> None:
    me = client.get("/v1/me").json()
    assert (me["owner"], me["scope"], me["key_id"]) == ("local", "admin", None)
    assert client.get("/v1/audit").json()["items"] == []


def test_with_keys_nothing_is_let_in_without_one(world: World) -> None:
    problem(world.client.get("/v1/jobs"), 401, "unauthorized")
    problem(world.client.get("/v1/jobs", headers=bearer(new_key())), 401, "unauthorized")
    assert world.client.get("/v1/jobs", headers=bearer(new_key())).headers["www-authenticate"].startswith("Bearer")
    assert world.client.get("/livez").status_code == 200


def test_signed_links_need_no_key(world: World) -> None:
    world.fill(ANNA)
    pair = world.ask(VIEWER, "GET", f"/v1/datasets/{world.ids['dataset_id'][0]}/pairs").json()["items"][0]
    assert world.client.get(pair["cf_url"].removeprefix(URL)).status_code == 200


def test_an_admin_makes_an_account_and_its_first_key(world: World) -> None:
    made = world.ask(ROOT, "POST", "/v1/accounts", json={"owner": "bert", "limits": {"pairs": 50}})
    assert made.status_code == 201 and made.headers["location"] == "/v1/accounts/bert"
    key = world.made(ROOT, "/v1/api-keys", json={"owner": "bert", "name": "laptop"})
    me = world.client.get("/v1/me", headers=bearer(key["key"])).json()
    assert (me["owner"], me["scope"], me["key_id"]) == ("bert", "researcher", key["id"])
    assert me["limits"] == {"active_jobs": 0, "pairs": 50, "bytes": 0}
    listed = world.ask(ROOT, "GET", "/v1/api-keys", params={"owner": "bert"}).json()["items"]
    assert [item["id"] for item in listed] == [key["id"]] and "key" not in listed[0]
    detail = world.ask(ROOT, "GET", "/v1/accounts/bert").json()
    assert detail["effective_limits"]["pairs"] == 50 and detail["usage"]["pairs"] == 0
    problem(world.ask(ROOT, "POST", "/v1/accounts", json={"owner": "bert"}), 409, "conflict")


@pytest.mark.parametrize(
    ("body", "pointer"),
    [
        ({"owner": "Bad Name"}, "/owner"),
        ({"owner": "bert", "limits": {"pairs": -1}}, "/limits/pairs"),
        ({"owner": "bert", "limits": {"cakes": 1}}, "/limits/cakes"),
    ],
)
def test_bad_accounts_are_named(world: World, body: dict[str, Any], pointer: str) -> None:
    found = problem(world.ask(ROOT, "POST", "/v1/accounts", json=body), 422, "invalid_spec")
    assert [item["pointer"] for item in found["errors"]] == [pointer]


def test_a_researcher_looks_after_their_own_keys_up_to_their_scope(world: World) -> None:
    made = world.made(ANNA, "/v1/api-keys", json={"name": "phone", "scope": "viewer"})
    assert made["owner"] == "anna" and made["key"].startswith(made["shown"].removesuffix("..."))
    body = {"name": "more", "scope": "admin"}
    problem(world.ask(ANNA, "POST", "/v1/api-keys", json=body), 403, "scope_too_small")
    problem(world.ask(ANNA, "POST", "/v1/api-keys", json={"name": "x", "owner": "admin"}), 404, "not_found")
    problem(world.ask(ANNA, "GET", "/v1/api-keys", params={"owner": "admin"}), 404, "not_found")
    problem(world.ask(VIEWER, "GET", "/v1/api-keys"), 403, "scope_too_small")
    assert world.ask(ANNA, "DELETE", f"/v1/api-keys/{made['id']}").status_code == 204
    problem(world.client.get("/v1/me", headers=bearer(made["key"])), 401, "unauthorized")
    listed = world.ask(ANNA, "GET", "/v1/api-keys", params={"spent": True}).json()["items"]
    assert listed[0]["id"] == made["id"] and listed[0]["revoked_at"] is not None


def test_a_key_may_be_given_an_end(world: World) -> None:
    until = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    assert world.made(ANNA, "/v1/api-keys", json={"name": "guest", "expires_at": until})["expires_at"] is not None
    for bad in ("2020-01-01T00:00:00Z", "9999-12-31T23:59:59-12:00"):
        answer = world.ask(ANNA, "POST", "/v1/api-keys", json={"name": "guest", "expires_at": bad})
        assert problem(answer, 422, "invalid_spec")["errors"][0]["pointer"] == "/expires_at"


def test_a_disabled_account_is_locked_out_and_its_data_stay(world: World) -> None:
    files = {"file": ("set.zip", good_upload(3), "application/zip")}
    made = world.made(ANNA, "/v1/datasets", files=files, data={"name": "theirs"})
    assert world.ask(ROOT, "POST", "/v1/accounts/anna:disable").json()["disabled_at"] is not None
    problem(world.ask(ANNA, "GET", "/v1/me"), 401, "unauthorized")
    assert world.ask(ROOT, "POST", "/v1/accounts/anna:enable").json()["disabled_at"] is None
    assert world.ask(ANNA, "GET", f"/v1/datasets/{made['id']}").status_code == 200
    problem(world.ask(ROOT, "POST", "/v1/accounts/admin:disable"), 409, "conflict")
    problem(world.ask(ROOT, "POST", "/v1/accounts/nobody:disable"), 404, "not_found")


def test_what_was_changed_is_in_the_audit_log_and_what_was_not_is_not(world: World) -> None:
    world.fill(ANNA)
    job = world.ids["job_id"][2]
    world.ask(ANNA, "POST", f"/v1/jobs/{job}:cancel")
    world.ask(ANNA, "POST", "/v1/training-jobs", json={"dataset_id": "ds_00000000000000000000"})
    world.ask(VIEWER, "DELETE", f"/v1/jobs/{job}")
    world.ask(ANNA, "GET", "/v1/jobs")
    world.ask(ANNA, "DELETE", f"/v1/jobs/{job}")
    done = actions(world, owner="anna")
    assert done == [
        ("anna", "deleteJob", job),
        ("anna", "cancelJob", job),
        ("anna", "createApiKey", world.ids["key_id"][0]),
        ("anna", "postEditJob", world.ids["job_id"][6]),
        ("anna", "postCaptionedJob", world.ids["job_id"][5]),
        ("anna", "postCaptionedTrainingJob", world.ids["job_id"][4]),
        ("anna", "postAttentionJob", world.ids["job_id"][3]),
        ("anna", "postEvaluationJob", job),
        ("anna", "postGenerationJob", world.ids["job_id"][1]),
        ("anna", "postTrainingJob", world.ids["job_id"][0]),
        ("anna", "uploadDataset", world.ids["dataset_id"][0]),
    ]
    assert actions(world, target=job, action="cancelJob") == [("anna", "cancelJob", job)]


def test_an_entry_names_key_and_request(world: World) -> None:
    key = world.ask(ANNA, "GET", "/v1/me").json()["key_id"]
    headers = bearer(world.keys[ANNA]) | {"X-Request-ID": "looked-for"}
    world.client.post("/v1/api-keys", headers=headers, json={"name": "x", "scope": "viewer"})
    entry = world.ask(ROOT, "GET", "/v1/audit").json()["items"][0]
    assert (entry["key_id"], entry["request_id"]) == (key, "looked-for")
    assert entry["data"] == {"status": 201, "path": "/v1/api-keys"}


def test_a_replayed_post_is_one_change(world: World) -> None:
    world.fill(ANNA)
    body = {"dataset_id": world.ids["dataset_id"][0], "steps": 2}
    for _ in range(3):
        headers = bearer(world.keys[ANNA]) | {"Idempotency-Key": "once"}
        assert world.client.post("/v1/training-jobs", json=body, headers=headers).status_code == 202
    assert len(actions(world, action="postTrainingJob")) == 2  # that of fill() and this one


def test_a_repeated_post_makes_no_second_account_and_no_second_key(world: World) -> None:
    def sent(path: str, **body: object) -> Any:
        headers = bearer(world.keys[ROOT]) | {"Idempotency-Key": "once"}
        return world.client.post(path, json=body, headers=headers)

    first, again = (sent("/v1/accounts", owner="bert", limits={}) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201) and first.json() == again.json()
    assert [answer.headers.get("idempotency-replayed") for answer in (first, again)] == [None, "true"]
    assert again.headers["location"] == "/v1/accounts/bert"
    problem(sent("/v1/accounts", owner="carl"), 422, "idempotency_key_reused")
    key, repeated = (sent("/v1/api-keys", owner="bert", name="laptop") for _ in range(2))
    assert (key.status_code, repeated.status_code) == (201, 201) and key.json() == repeated.json()
    assert (repeated.headers["idempotency-replayed"], repeated.headers["cache-control"]) == ("true", "no-store")
    assert world.client.get("/v1/me", headers=bearer(repeated.json()["key"])).json()["owner"] == "bert"
    problem(sent("/v1/api-keys", owner="bert", name="phone"), 422, "idempotency_key_reused")
    assert len(world.ask(ROOT, "GET", "/v1/api-keys", params={"owner": "bert"}).json()["items"]) == 1
    done = [action for _, action, target in actions(world) if target in ("bert", key.json()["id"])]
    assert done == ["createApiKey", "createAccount"], "a replay changes nothing and is in no audit log"
    world.ask(ROOT, "DELETE", f"/v1/api-keys/{key.json()['id']}")
    late = sent("/v1/api-keys", owner="bert", name="laptop")
    assert late.status_code == 201 and (late.json()["id"], late.json()["key"]) == (key.json()["id"], None)


def test_a_repeated_post_tells_no_key_of_a_scope_above_the_callers(world: World) -> None:
    body, headers = {"name": "x", "scope": "admin", "owner": "anna"}, {"Idempotency-Key": "once"}
    own = world.made(ROOT, "/v1/api-keys", json={"name": "annas", "owner": "anna", "scope": "admin"})["key"]
    assert world.client.post("/v1/api-keys", json=body, headers=headers | bearer(own)).status_code == 201
    refused = world.client.post("/v1/api-keys", json=body, headers=headers | bearer(world.keys[ANNA]))
    problem(refused, 403, "scope_too_small")


def test_marks_of_old_keys_are_swept(world: World) -> None:
    headers = bearer(world.keys[ANNA]) | {"Idempotency-Key": "once"}
    world.client.post("/v1/api-keys", json={"name": "x", "scope": "viewer"}, headers=headers)
    aged = post_keys.update().values(at=post_keys.c.at - 90_000)
    world.backend.store.database.write(lambda connection: connection.execute(aged))
    _remove_what_nobody_needs(world.backend)
    assert world.backend.accounts.erase_marks() == 0


def test_an_audit_log_that_takes_no_entry_stops_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageUnavailable("the disk is full")

    monkeypatch.setattr(world.backend.audit, "append", full)
    world.made(ANNA, "/v1/api-keys", json={"name": "x", "scope": "viewer"})
    assert "the audit log has no entry of POST /v1/api-keys: the disk is full" in caplog.text


def test_quotas_over_http(tmp_path: Path, migrated: Path) -> None:
    app = keyed(fresh_home(tmp_path, migrated), quota_active_jobs=1, quota_bytes=40_000)
    with opened(app) as client:
        world = peopled(client, app.state.backend, tmp_path)
        upload = {"files": {"file": ("set.zip", good_upload(3), "application/zip")}, "data": {"name": "theirs"}}
        dataset = world.made(ANNA, "/v1/datasets", **upload)["id"]
        body = {"dataset_id": dataset, "steps": 2}
        world.made(ANNA, "/v1/training-jobs", json=body)
        refused = world.ask(ANNA, "POST", "/v1/training-jobs", json=body)
        assert problem(refused, 429, "quota_exceeded")["retryable"] is True
        assert int(refused.headers["retry-after"]) > 0
        # More than the whole limit is refused by its length, before the body is read.
        large = {"files": {"file": ("set.zip", b"0" * 60_000, "application/zip")}, "data": {"name": "large"}}
        assert problem(world.ask(ANNA, "POST", "/v1/datasets", **large), 403, "quota_exceeded")["retryable"] is False
        me = world.ask(ANNA, "GET", "/v1/me").json()
        assert me["usage"]["active_jobs"] == 1 and 0 < me["usage"]["bytes"] <= me["limits"]["bytes"] == 40_000
        world.ask(ROOT, "PUT", "/v1/accounts/anna/limits", json={"active_jobs": 2})
        world.made(ANNA, "/v1/training-jobs", json=body)


def test_old_audit_entries_are_swept(world: World) -> None:
    world.made(ANNA, "/v1/api-keys", json={"name": "x", "scope": "viewer"})
    object.__setattr__(world.backend.settings, "audit_days", 1e-9)
    _remove_what_nobody_needs(world.backend)
    assert actions(world) == []


def test_no_log_holds_a_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        made = world.made(ANNA, "/v1/api-keys", json={"name": "x", "scope": "viewer"})
        world.client.get("/v1/me", headers=bearer(made["key"]))
    assert "/v1/api-keys" in caplog.text and not re.search(r"cffa_[0-9A-Za-z]{38}", caplog.text)


def test_only_with_keys_may_the_embedded_service_listen_to_others(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, host="0.0.0.0")
    with pytest.raises(InvalidSettings, match="CFFA_REQUIRE_KEYS"):
        create_app(settings)
    keyed(settings)


def test_the_store_of_another_process_sees_the_same_limits(world: World) -> None:
    world.ask(ROOT, "PUT", "/v1/accounts/anna/limits", json={"bytes": 1})
    store = JobStore(world.backend.settings.record_url)
    with pytest.raises(QuotaExceeded, match="over the limit of 1"):
        store.require_bytes("anna", 2)
    store.close()
