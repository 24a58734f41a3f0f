"""The first admin key, and accounts, keys, limits and the audit log from the command line, on a real served API."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import uvicorn
from typer.testing import CliRunner, Result

from cffa_core.errors import Conflict, InvalidSettings, QuotaExceeded
from cffa_core.jobs.store import JobStore
from cffa_core.people.audit import AuditLog
from cffa_core.people.bootstrap import bootstrap
from cffa_core.people.keys import Scope, is_well_formed
from cffa_core.settings import Settings
from services.api.app import create_app
from services.client.cli import app
from services.client.client import CffaClient
from services.client.problems import ApiError, ApiQuotaExceeded, ApiScopeTooSmall, ApiUnauthorized
from services.client.servers import free_port
from tests.faulty_proxy import Fault, faulty_proxy


@contextmanager
def served(settings: Settings) -> Iterator[str]:
    """The API in a thread of this process; yields its address."""
    server = uvicorn.Server(uvicorn.Config(create_app(settings), host="127.0.0.1", port=settings.port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield settings.url
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("people") / "home", require_keys=True, port=free_port())


@pytest.fixture(scope="module")
def root(settings: Settings) -> str:
    """An admin's key, made before the service was ever started."""
    known, key = bootstrap(settings)
    assert known.scope is Scope.ADMIN and is_well_formed(key)
    return key


@pytest.fixture(scope="module")
def url(settings: Settings, root: str) -> Iterator[str]:
    with served(settings) as address:
        yield address


def cffa(url: str, key: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, list(arguments), env={"CFFA_URL": url, "CFFA_API_KEY": key, "CFFA_API_KEY_FILE": None}
    )


def done(url: str, key: str, *arguments: str) -> str:
    result = cffa(url, key, *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_bootstrap_is_refused_when_there_is_an_admin_key_unless_forced(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, require_keys=True)
    first, _ = bootstrap(settings)
    with pytest.raises(Conflict, match="--force"):
        bootstrap(settings)
    second, _ = bootstrap(settings, name="lost the first", force=True)
    store = JobStore(settings.record_url)
    entries = AuditLog(store.database).entries(action="bootstrap").items
    store.close()
    assert [(entry.target, entry.data) for entry in entries] == [
        (second.id, {"force": True}),
        (first.id, {"force": False}),
    ]


def test_bootstrap_of_a_cluster_wants_its_secret() -> None:
    servers = {"database_url": "postgresql+psycopg://cffa@127.0.0.1:9/cffa", "broker_url": "redis://127.0.0.1:9/0"}
    store = {"s3_endpoint": "http://127.0.0.1:9", "s3_access_key": "a", "s3_secret_key": "long enough for this"}
    with pytest.raises(InvalidSettings, match="CFFA_KEY_SECRET"):
        bootstrap(Settings(mode="cluster", **servers, **store))  # type: ignore[arg-type]


def test_bootstrap_on_the_command_line_prints_the_key_alone(tmp_path: Path) -> None:
    environment = {"CFFA_HOME": str(tmp_path), "CFFA_REQUIRE_KEYS": "true"}
    result = CliRunner().invoke(app, ["admin", "bootstrap"], env=environment)
    assert result.exit_code == 0 and is_well_formed(result.stdout.strip())
    again = CliRunner().invoke(app, ["admin", "bootstrap"], env=environment)
    assert again.exit_code == 1 and again.stderr.startswith("error: there is an admin key already")


def test_from_the_first_key_to_a_colleague_at_work(url: str, root: str) -> None:
    done(url, root, "admin", "account", "add", "anna", "--pairs", "100", "--active-jobs", "2")
    key = done(url, root, "admin", "key", "add", "anna", "--name", "laptop").strip()
    me = json.loads(done(url, key, "whoami", "--json"))
    assert (me["owner"], me["scope"]) == ("anna", "researcher")
    assert me["limits"] == {"active_jobs": 2, "pairs": 100, "bytes": 0}
    assert "anna, scope researcher" in cffa(url, key, "whoami").stderr
    accounts = json.loads(done(url, root, "admin", "account", "list", "--json"))
    assert [account["owner"] for account in accounts] == ["admin", "anna"]


def test_limits_are_changed_one_by_one_and_reset(url: str, root: str) -> None:
    done(url, root, "admin", "account", "add", "bert", "--bytes", "10")
    shown = json.loads(done(url, root, "admin", "account", "limits", "bert", "--pairs", "7", "--json"))
    assert shown["limits"] == {"bytes": 10, "pairs": 7} and shown["effective_limits"]["active_jobs"] == 0
    assert "no limit" in done(url, root, "admin", "account", "limits", "bert")
    shown = json.loads(done(url, root, "admin", "account", "limits", "bert", "--reset", "--pairs", "3", "--json"))
    assert shown["limits"] == {"pairs": 3}


def test_keys_are_listed_and_revoked(url: str, root: str) -> None:
    done(url, root, "admin", "account", "add", "carl")
    key = done(url, root, "admin", "key", "add", "carl", "--scope", "viewer", "--days", "2").strip()
    listed = json.loads(done(url, root, "admin", "key", "list", "carl", "--json"))
    assert listed[0]["scope"] == "viewer" and listed[0]["expires_at"] and key not in json.dumps(listed)
    assert listed[0]["id"] in done(url, root, "admin", "key", "list", "carl")
    done(url, root, "admin", "key", "revoke", listed[0]["id"])
    assert "not one of this service" in cffa(url, key, "whoami").stderr
    assert json.loads(done(url, root, "admin", "key", "list", "carl", "--json")) == []
    assert "revoked" in done(url, root, "admin", "key", "list", "carl", "--spent")


def test_a_disabled_account_is_shown_and_locked_out(url: str, root: str) -> None:
    done(url, root, "admin", "account", "add", "dora")
    key = done(url, root, "admin", "key", "add", "dora").strip()
    done(url, root, "admin", "account", "disable", "dora")
    assert cffa(url, key, "whoami").exit_code == 1
    assert json.loads(done(url, root, "admin", "account", "enable", "dora", "--json"))[0]["disabled_at"] is None
    assert cffa(url, key, "whoami").exit_code == 0


def test_the_audit_log_on_the_command_line(url: str, root: str) -> None:
    done(url, root, "admin", "account", "add", "emil")
    entries = json.loads(done(url, root, "admin", "audit", "--target", "emil", "--json"))
    assert [(entry["owner"], entry["action"]) for entry in entries] == [("admin", "createAccount")]
    assert "createAccount" in done(url, root, "admin", "audit", "-n", "1", "--action", "createAccount", "--days", "1")
    assert json.loads(done(url, root, "admin", "audit", "--owner", "nobody", "--json")) == []


def test_lost_answers_make_one_account_and_one_key(url: str, root: str) -> None:
    def lost(number: int, head: str) -> Fault | None:
        return Fault(cut_answer_after=0) if number in (0, 2) else None

    with (
        faulty_proxy(urlsplit(url).port or 0, lost) as proxy,
        CffaClient(f"http://127.0.0.1:{proxy.port}", api_key=root) as admin,
    ):
        assert admin.people.create_account("hugo").owner == "hugo"
        made = admin.people.create_key("laptop", owner="hugo")
        assert len(proxy.heads) == 4
    with CffaClient(url, api_key=made.key) as client:
        assert client.people.me().key_id == made.id
        assert client.people.me().owner == "hugo"


def test_a_key_that_was_revoked_before_it_was_told_is_a_conflict() -> None:
    known = {"id": "key_1", "owner": "anna", "name": "x", "scope": "viewer", "shown": "cffa_", "key": None}
    answer = known | {"created_at": "2026-11-21T12:00:00Z"}
    network = httpx.MockTransport(lambda request: httpx.Response(201, json=answer))
    with CffaClient("http://there", transport=network) as client, pytest.raises(Conflict, match="revoke it"):
        client.people.create_key("x")


def test_the_client_names_what_was_refused(url: str, root: str) -> None:
    with CffaClient(url, api_key=root) as admin:
        admin.people.create_account("fred")
        key = admin.people.create_key("tests", owner="fred", scope="viewer").key
        researcher = admin.people.create_key("tests", owner="fred").key
        admin.people.set_limits("fred", {"bytes": 1})
    with CffaClient(url, api_key=key) as client:
        assert client.people.me().scope == "viewer"
        with pytest.raises(ApiScopeTooSmall, match="of scope researcher, and yours is viewer"):
            client.people.create_key("more")
        with pytest.raises(ApiScopeTooSmall, match="admin"):
            next(client.people.audit())
    with CffaClient(url, api_key="cffa_wrong") as stranger, pytest.raises(ApiUnauthorized):
        stranger.people.me()
    answer = httpx.post(
        f"{url}/v1/datasets",
        headers={"Authorization": f"Bearer {researcher}"},
        files={"file": ("a.zip", b"0" * 100)},
        data={"name": "a"},
    )
    assert answer.status_code == 403
    assert issubclass(ApiQuotaExceeded, QuotaExceeded) and answer.json()["code"] == ApiQuotaExceeded.code
    with CffaClient(url, api_key=researcher) as client, pytest.raises(ApiError) as caught:
        client.people.create_account("mine")
    assert caught.value.status == 403


def test_pages_are_walked_to_their_end(url: str, root: str) -> None:
    with CffaClient(url, api_key=root) as admin:
        admin.people.create_account("gerd")
        for number in range(51):
            admin.people.create_key(f"k{number}", owner="gerd", scope="viewer")
        assert [key.name for key in admin.people.keys("gerd")] == [f"k{number}" for number in reversed(range(51))]
        assert len({entry.number for entry in admin.people.audit(action="createApiKey")}) >= 51
