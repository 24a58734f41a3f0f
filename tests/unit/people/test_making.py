"""Posts with an idempotency key that make accounts and API keys, on each database: once, and told again for a day."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa

from cffa_core.errors import Conflict, InvalidSpec, NotFound
from cffa_core.jobs.database import Database
from cffa_core.jobs.post_keys import Makes, Post
from cffa_core.jobs.service_tables import api_keys, post_keys
from cffa_core.people import keys
from cffa_core.people.accounts import Accounts
from cffa_core.people.keys import Caller, Scope
from cffa_core.people.making import NewKey
from tests.commit_proxy import When, commit_proxy
from tests.record_servers import PostgresRecords

SECRET = b"a secret of these tests alone......"
AT_ONCE = 8


@pytest.fixture
def database(record_url: str) -> Iterator[Database]:
    opened = Database(record_url)
    yield opened
    opened.close()


@pytest.fixture
def people(database: Database) -> Accounts:
    made = Accounts(database, SECRET)
    made.create_account("anna")
    return made


def post(makes: Makes, body: Any = None, *, key: str = "once", owner: str = "admin") -> Post:
    """A call; each is one of its own, with a mark of its own."""
    made = Post.of(owner, makes, key, body)
    assert made is not None
    return made


def make(people: Accounts, body: Any = None, *, key: str = "once", owner: str = "anna") -> NewKey:
    return people.post_key(post(Makes.API_KEY, body, key=key), owner, name="laptop", scope=Scope.RESEARCHER)


def older(database: Database, seconds: float) -> None:
    aged = post_keys.update().values(at=post_keys.c.at - seconds)
    database.write(lambda connection: connection.execute(aged))


def test_one_key_makes_one_account(people: Accounts) -> None:
    first = people.post_account(post(Makes.ACCOUNT, "bert"), "bert", {"pairs": 5})
    people.set_limits("bert", {"pairs": 9})
    again = people.post_account(post(Makes.ACCOUNT, "bert"), "bert", {"pairs": 5})
    assert (first.replayed, again.replayed) == (False, True)
    assert again.account == people.get_account("bert") and again.account.limits == {"pairs": 9}
    with pytest.raises(Conflict) as other:
        people.post_account(post(Makes.ACCOUNT, "carl"), "carl")
    assert [problem.code for problem in other.value.problems] == ["idempotency_key_reused"]
    with pytest.raises(Conflict, match="already") as taken:
        people.post_account(post(Makes.ACCOUNT, "bert", key="another"), "bert")
    assert taken.value.problems == ()
    assert [account.owner for account in people.list_accounts().items] == ["anna", "bert"]


def test_a_refused_post_leaves_its_key_free(people: Accounts) -> None:
    past = datetime.now(UTC) - timedelta(hours=1)
    with pytest.raises(InvalidSpec):
        people.post_key(post(Makes.API_KEY), "anna", name="x", scope=Scope.VIEWER, expires_at=past)
    with pytest.raises(NotFound):
        make(people, owner="nobody")
    assert not make(people, "another body").replayed


def test_one_key_makes_one_api_key_and_tells_it_again(people: Accounts) -> None:
    first, again = make(people), make(people)
    assert again == NewKey(first.known, first.key, replayed=True) and not first.replayed
    assert first.key is not None and keys.is_well_formed(first.key)
    assert people.find(first.key) == Caller("anna", Scope.RESEARCHER, first.known.id)
    assert first.known.shown == keys.shown(first.key)
    with pytest.raises(Conflict) as other:
        make(people, "another body")
    assert [problem.code for problem in other.value.problems] == ["idempotency_key_reused"]
    assert "once" not in other.value.message, "what a key is derived from goes into no log"
    assert [item.id for item in people.list_keys("anna").items] == [first.known.id]


def test_keys_of_posts_are_apart_by_who_posts_and_what_it_makes(people: Accounts) -> None:
    first = make(people)
    people.post_account(post(Makes.ACCOUNT), "once")
    other = people.post_key(post(Makes.API_KEY, owner="bert"), "anna", name="laptop", scope=Scope.RESEARCHER)
    assert not other.replayed and other.known.id != first.known.id and other.key != first.key


def test_a_key_is_told_again_for_a_day_and_then_cannot_be_derived(people: Accounts, database: Database) -> None:
    first = make(people)
    older(database, 86_000)
    assert people.erase_marks() == 0 and make(people).key == first.key
    older(database, 1_000)
    late = make(people)
    assert (late.known, late.key, late.replayed) == (first.known, None, True)
    assert people.erase_marks() == 1 and people.erase_marks() == 0
    older(database, -87_000)
    assert make(people).key is None, "the mark is gone: no clock brings it back"
    assert first.key is not None and people.find(first.key) is not None


def test_a_key_that_is_good_no_more_is_not_told_again(people: Accounts, database: Database) -> None:
    revoked = make(people)
    people.revoke_key(revoked.known.id)
    again = make(people)
    assert again.key is None and again.known.revoked_at is not None
    other = Accounts(database, b"another secret of the service......")
    make(people, key="before")
    assert make(other, key="before").key is None


def test_the_record_alone_tells_no_key(people: Accounts, database: Database) -> None:
    """Nor does the record with the secret: the idempotency key is not in it."""
    made = make(people, key="a key that its client alone knows")
    row = database.read(lambda connection: connection.execute(sa.select(post_keys)).one())
    held = [str(value) for value in row]
    assert made.key is not None
    assert not [value for value in held if made.key[5:] in value or "alone" in value]
    assert keys.key_of_post(SECRET, "a key that its client alone knows", row.mark) == made.key
    assert row.mark not in repr(post(Makes.API_KEY)) and "once" not in repr(post(Makes.API_KEY))


def test_accounts_do_not_lose_their_marks(people: Accounts, database: Database) -> None:
    people.post_account(post(Makes.ACCOUNT), "bert")
    older(database, 10 * 86_400)
    assert people.erase_marks() == 0
    assert people.post_account(post(Makes.ACCOUNT), "bert").replayed


def test_posts_with_one_key_at_once_make_one_key_and_one_account(people: Accounts, database: Database) -> None:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        made = list(pool.map(lambda _: make(people), range(AT_ONCE)))
        opened = list(pool.map(lambda _: people.post_account(post(Makes.ACCOUNT), "bert"), range(AT_ONCE)))
    assert len({new.known.id for new in made}) == len({new.key for new in made}) == 1
    assert [new.replayed for new in made].count(False) == [new.replayed for new in opened].count(False) == 1
    assert len(database.read(lambda connection: connection.execute(sa.select(api_keys)).all())) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_commit_without_an_answer_happens_once_and_is_no_repetition(
    postgres_records: PostgresRecords, when: When
) -> None:
    url = postgres_records.new()
    with commit_proxy(sa.make_url(url).port or 0) as proxy:
        through = sa.make_url(url).set(port=proxy.port).render_as_string(hide_password=False)
        database = Database(through)
        shaky = Accounts(database, SECRET)
        shaky.has_admin()
        proxy.arm(when)
        assert not shaky.post_account(post(Makes.ACCOUNT), "anna").replayed
        proxy.arm(when)
        made = make(shaky)
        assert not made.replayed and made.key is not None
        assert shaky.find(made.key) == Caller("anna", Scope.RESEARCHER, made.known.id)
        assert len(shaky.list_keys("anna").items) == 1
        database.close()
    postgres_records.drop(url)
