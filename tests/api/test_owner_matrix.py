"""Every operation of the OpenAPI document against another owner's ids, and against every scope.

The operations are read from the document, so a new one is tested without anybody thinking of it; a path parameter that
these tests do not know makes them fail until ``people_world`` has something real of that kind.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from cffa_core.people.keys import Scope
from cffa_core.settings import Settings
from services.api.app import OPEN_TEMPLATES, create_app
from services.api.keys import OPEN, needed_scope
from tests.api.conftest import fresh_home
from tests.api.driving import URL, Worker, problem
from tests.api.people_world import BOOTSTRAP, World

ANNA, BERT, ROOT, BERT_ADMIN = "anna-researcher", "bert-researcher", "root", "bert-admin"
Operation = tuple[str, str]


@cache
def document() -> dict[str, Any]:
    app = create_app(Settings(home=Path("unused"), require_keys=True, bootstrap_key=BOOTSTRAP))
    found: dict[str, Any] = app.openapi()
    return found


@cache
def operations() -> dict[Operation, Any]:
    """Method and path of every closed operation."""
    return {
        (method, path): operation
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if path not in OPEN | OPEN_TEMPLATES
    }


def with_ids() -> list[Operation]:
    """Operations on something that has an owner."""
    return [(method, path) for method, path in operations() if re.search(r"\{\w*_id\}", path)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, migrated: Path) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("people")
    settings = fresh_home(folder, migrated).model_copy(
        update={"require_keys": True, "bootstrap_key": Settings(bootstrap_key=BOOTSTRAP).bootstrap_key}
    )
    app = create_app(settings)
    with TestClient(app, base_url=URL, raise_server_exceptions=False) as client:
        backend = app.state.backend
        made = World(client, backend, Worker(backend.store, backend.objects, folder / "worker"))
        made.keys[ROOT] = BOOTSTRAP
        made.person("anna", Scope.RESEARCHER)
        made.person("bert", *Scope)
        made.fill(ANNA)
        yield made


def addresses(world: World, path: str) -> Iterator[str]:
    """The path with every combination of anna's ids."""
    names = re.findall(r"\{(\w+)\}", path)
    unknown = [name for name in names if name not in world.ids]
    assert not unknown, f"{path}: tests/api/people_world.py must make something real for {unknown}"
    for values in itertools.product(*(world.ids[name] for name in names)):
        yield path.format(**dict(zip(names, values, strict=True)))


def body_of(operation: Any) -> dict[str, Any]:
    """Options of a request with the body that the document shows as an example."""
    content = operation.get("requestBody", {}).get("content", {})
    if "application/json" not in content:
        return {}
    schema = content["application/json"]["schema"]
    schema = next((part for part in schema.get("anyOf", ()) if "$ref" in part), schema)
    if "$ref" in schema:
        schema = document()["components"]["schemas"][schema["$ref"].rsplit("/", 1)[-1]]
    return {"json": schema.get("examples", [{}])[0]}


def test_there_is_much_to_test() -> None:
    assert len(with_ids()) > 30 and len(operations()) > len(with_ids())


@pytest.mark.parametrize(("method", "path"), with_ids())
def test_what_belongs_to_another_owner_is_not_found(world: World, method: str, path: str) -> None:
    # Keys apart, an admin has no way to another owner's things either.
    for who in [BERT] if "{key_id}" in path else [BERT, BERT_ADMIN, ROOT]:
        for address in addresses(world, path):
            answer = world.ask(who, method.upper(), address, **body_of(operations()[method, path]))
            if method == "head":
                assert answer.status_code == 404, (who, address)
            else:
                problem(answer, 404, "not_found")


@pytest.mark.parametrize(("method", "path"), [found for found in with_ids() if found[0] == "get"])
def test_what_was_not_found_is_there(world: World, method: str, path: str) -> None:
    found = [world.ask(ANNA, method.upper(), address).status_code for address in addresses(world, path)]
    assert {200, 409} & set(found), found


LISTS = [path for method, path in operations() if method == "get" and "{" not in path]
OF_ADMINS = {"/v1/accounts", "/v1/audit"}


@pytest.mark.parametrize("path", sorted(set(LISTS) - OF_ADMINS))
def test_no_list_shows_another_owners_ids(world: World, path: str) -> None:
    hidden = [value for name, values in world.ids.items() if name.endswith("_id") for value in values]
    for who in (BERT, BERT_ADMIN, ROOT):
        answer = world.ask(who, "GET", path)
        assert answer.status_code == 200, answer.text
        assert not [value for value in hidden if value in answer.text], who


def names_something(operation: Any) -> bool:
    """Whether the body of an operation says ids of what exists."""
    return any(name.endswith("_id") for name in body_of(operation).get("json", {}))


POSTS = [
    (path, operation)
    for (method, path), operation in operations().items()
    if method == "post" and "{" not in path and names_something(operation)
]


@pytest.mark.parametrize(("path", "operation"), POSTS, ids=[path for path, _ in POSTS])
def test_no_post_may_name_what_belongs_to_another(world: World, path: str, operation: Any) -> None:
    body = body_of(operation)["json"]
    for name in body:
        kind = next((kind for kind in ("dataset_id", "job_id", "model_id") if name.endswith(kind)), None)
        if kind is not None:
            body = body | {name: world.ids[kind][1 if kind == "job_id" else 0]}
    answer = world.ask(BERT, "POST", path, json=body)
    assert answer.status_code in (404, 422), answer.text


def test_enough_posts_name_something() -> None:
    known = {"/v1/training-jobs", "/v1/generation-jobs", "/v1/evaluation-jobs", "/v1/attention-jobs"}
    known |= {"/v1/captioned-training-jobs", "/v1/captioned-jobs", "/v1/edit-jobs"}
    assert known <= {path for path, _ in POSTS}


def test_nothing_of_annas_was_touched(world: World) -> None:
    jobs = world.ask(ANNA, "GET", "/v1/jobs").json()["items"]
    states = ("succeeded", "succeeded", "queued", "succeeded", "succeeded", "queued", "queued")
    assert {job["id"]: job["state"] for job in jobs} == dict(zip(world.ids["job_id"], states, strict=True))
    for path, number in (("datasets", 1), ("models", 2), ("webhooks", 1)):
        listed = world.ask(ANNA, "GET", f"/v1/{path}").json()["items"]
        assert len(listed) == number, json.dumps(listed)
    assert len(world.ask(ANNA, "GET", "/v1/api-keys").json()["items"]) == 2


@pytest.mark.parametrize(("method", "path"), sorted(operations()))
def test_scopes(world: World, method: str, path: str) -> None:
    nowhere = {name: f"{name.removesuffix('_id')}_{'0' * 20}" for name in re.findall(r"\{(\w+)\}", path)}
    address = path.format(**(nowhere | {"index": "0", "number": "0", "modality": "cf", "owner": "nobody"}))
    for scope in Scope:
        answer = world.ask(f"bert-{scope}", method.upper(), address)
        if scope.covers(needed_scope(method.upper(), path)):
            assert answer.status_code not in (401, 403), answer.text
        elif method == "head":
            assert answer.status_code == 403
        else:
            problem(answer, 403, "scope_too_small")


def test_admins_alone_see_accounts_and_the_audit_log() -> None:
    needs = {path: needed_scope(method.upper(), path) for method, path in operations()}
    assert {path for path, scope in needs.items() if scope is Scope.ADMIN} == {
        "/v1/accounts",
        "/v1/accounts/{owner}",
        "/v1/accounts/{owner}/limits",
        "/v1/accounts/{owner}:disable",
        "/v1/accounts/{owner}:enable",
        "/v1/audit",
    }
