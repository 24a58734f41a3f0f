"""Accounts and keys in the record, on each database: who a key speaks for, and what makes it worthless."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from cffa_core.errors import Conflict, InvalidSpec, NotFound
from cffa_core.jobs.database import Database
from cffa_core.jobs.service_tables import api_keys
from cffa_core.people import keys
from cffa_core.people.accounts import REMEMBERED_SECONDS, Accounts
from cffa_core.people.keys import Caller, Scope
from cffa_core.people.quotas import Limits

SECRET = b"a secret of these tests alone......"
SOON = timedelta(hours=1)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def database(record_url: str) -> Iterator[Database]:
    opened = Database(record_url)
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def people(database: Database, clock: Clock) -> Accounts:
    made = Accounts(database, SECRET, now=clock)
    made.create_account("anna")
    return made


def later(clock: Clock) -> None:
    clock.time += REMEMBERED_SECONDS + 0.1


def test_a_key_speaks_for_its_account(people: Accounts) -> None:
    known, key = people.create_key("anna", name="laptop", scope=Scope.RESEARCHER)
    assert people.find(key) == Caller("anna", Scope.RESEARCHER, known.id)
    assert (known.name, known.owner, known.shown) == ("laptop", "anna", key[:11] + "...")
    assert known.id.startswith("key_") and known.last_used_at is None


def test_the_record_holds_no_key(people: Accounts, database: Database) -> None:
    _, key = people.create_key("anna", name="laptop", scope=Scope.VIEWER)
    row = database.read(lambda connection: connection.execute(sa.select(api_keys)).one())
    assert row.digest == keys.digest(key, SECRET)
    assert not [value for value in row if isinstance(value, str) and key[11:] in value]


def test_another_secret_opens_nothing(people: Accounts, database: Database) -> None:
    _, key = people.create_key("anna", name="laptop", scope=Scope.VIEWER)
    assert Accounts(database, b"another secret").find(key) is None


def test_unknown_and_mistyped_keys(people: Accounts, database: Database) -> None:
    assert people.find(keys.new_key()) is None
    database.close()
    gone = Accounts(Database("postgresql+psycopg://cffa@127.0.0.1:9/cffa"), SECRET)
    assert gone.find("cffa_" + "x" * 38) is None  # no question is asked: there is nobody who could answer


def test_a_revoked_key_is_worthless_at_once_here_and_soon_elsewhere(
    people: Accounts, database: Database, clock: Clock
) -> None:
    known, key = people.create_key("anna", name="laptop", scope=Scope.VIEWER)
    other = Accounts(database, SECRET, now=clock)
    assert people.find(key) and other.find(key)
    first = people.revoke_key(known.id)
    assert people.find(key) is None
    assert other.find(key) is not None
    later(clock)
    assert other.find(key) is None
    assert people.revoke_key(known.id) == first


def test_a_key_expires(people: Accounts, database: Database, clock: Clock) -> None:
    soon = datetime.now(UTC) + SOON
    known, key = people.create_key("anna", name="guest", scope=Scope.VIEWER, expires_at=soon)
    assert known.expires_at is not None and abs(known.expires_at - soon) < timedelta(milliseconds=1)
    assert people.find(key) is not None
    past = api_keys.update().values(expires_at=(soon - 2 * SOON).timestamp())
    database.write(lambda connection: connection.execute(past))
    later(clock)
    assert people.find(key) is None
    assert people.list_keys("anna").items == ()
    assert [item.id for item in people.list_keys("anna", spent=True).items] == [known.id]


def test_a_time_that_has_passed_is_refused(people: Accounts) -> None:
    with pytest.raises(InvalidSpec) as caught:
        people.create_key("anna", name="x", scope=Scope.VIEWER, expires_at=datetime.now(UTC) - SOON)
    assert caught.value.problems[0].pointer == "/expires_at"
    assert people.list_keys("anna", spent=True).items == ()


def test_a_disabled_account_has_no_good_key_until_it_is_enabled(people: Accounts) -> None:
    _, key = people.create_key("anna", name="laptop", scope=Scope.ADMIN)
    assert people.has_admin()
    disabled = people.disable("anna")
    assert disabled.disabled_at is not None and people.disable("anna") == disabled
    assert people.find(key) is None and not people.has_admin()
    assert people.enable("anna").disabled_at is None
    assert people.find(key) is not None


def test_use_is_noted_to_the_minute(people: Accounts, database: Database, clock: Clock) -> None:
    known, key = people.create_key("anna", name="laptop", scope=Scope.VIEWER)
    people.find(key)
    first = people.list_keys("anna").items[0].last_used_at
    assert first is not None
    later(clock)
    people.find(key)
    assert people.list_keys("anna").items[0].last_used_at == first
    earlier = api_keys.update().values(last_used_at=first.timestamp() - 61.0)
    database.write(lambda connection: connection.execute(earlier))
    later(clock)
    people.find(key)
    again = people.list_keys("anna").items[0].last_used_at
    assert again is not None and again >= first
    assert known.last_used_at is None


def test_keys_of_another_account_are_not_found(people: Accounts) -> None:
    people.create_account("bert")
    known, key = people.create_key("anna", name="laptop", scope=Scope.VIEWER)
    with pytest.raises(NotFound):
        people.revoke_key(known.id, owner="bert")
    with pytest.raises(NotFound):
        people.create_key("nobody", name="x", scope=Scope.VIEWER)
    assert people.list_keys("bert").items == () and people.find(key) is not None


def test_built_in_owners_need_no_account(people: Accounts) -> None:
    _, key = people.create_key("admin", name="first", scope=Scope.ADMIN)
    assert people.find(key) is not None
    people.create_key("admin", name="second", scope=Scope.ADMIN)
    assert [account.owner for account in people.list_accounts().items] == ["admin", "anna"]


def test_accounts_are_listed_in_pages(people: Accounts) -> None:
    for owner in ("carl", "bert", "dora@clinic.example"):
        people.create_account(owner)
    first = people.list_accounts(2)
    second = people.list_accounts(2, first.next_token)
    assert [item.owner for item in (*first.items, *second.items)] == ["anna", "bert", "carl", "dora@clinic.example"]
    assert second.next_token is None
    with pytest.raises(InvalidSpec):
        people.list_accounts(2, "Not a token")


def test_names_and_limits_are_checked(people: Accounts) -> None:
    with pytest.raises(Conflict):
        people.create_account("anna")
    for name in ("", "Anna", "a b", "-a", "a" * 65, "../x", "a/b"):
        with pytest.raises(InvalidSpec):
            people.create_account(name)
    bad: list[dict[str, int]] = [{"cakes": 1}, {"pairs": -1}, {"bytes": 2**63}, {"pairs": True}]
    for limits in bad:
        with pytest.raises(InvalidSpec) as caught:
            people.set_limits("anna", limits)
        assert caught.value.problems[0].pointer == f"/limits/{next(iter(limits))}"


def test_an_account_has_limits_of_its_own(database: Database) -> None:
    people = Accounts(database, SECRET, defaults=Limits(active_jobs=5, pairs=100, bytes=7))
    people.create_account("anna", {"pairs": 1000, "bytes": 0})
    assert people.limits("anna") == Limits(active_jobs=5, pairs=1000, bytes=0)
    assert people.limits("somebody without an account") == Limits(5, 100, 7)
    assert people.set_limits("anna", {"active_jobs": 1}).limits == {"active_jobs": 1}
    assert people.limits("anna") == Limits(1, 100, 7)
    with pytest.raises(NotFound):
        people.set_limits("nobody", {})
