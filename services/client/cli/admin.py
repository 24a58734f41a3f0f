"""``cffa admin``: accounts, keys, limits, the audit log of a service; and ``cffa whoami``.

All of it goes through the service with an admin's key, except ``bootstrap``, which makes the first one on the server.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Annotated, Any, Literal

import typer

from services.client.cli import options
from services.client.cli.options import Key, Url
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, say

admin = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Accounts, keys, limits and the audit log.")
account = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Accounts and their limits.")
key = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Keys of accounts.")

SomeOwner = Annotated[str | None, typer.Argument(metavar="[OWNER]", help="Account; by default your own.")]
OwnerName = Annotated[str, typer.Argument(metavar="OWNER", help="Name of the account.")]
ActiveJobs = Annotated[int | None, typer.Option(min=0, help="Jobs that are not over; 0 for no limit.")]
Pairs = Annotated[
    int | None, typer.Option(min=0, help="Pairs asked for in generation and edit jobs that are kept; 0: no limit.")
]
Bytes = Annotated[int | None, typer.Option("--bytes", min=0, help="Stored bytes; 0 for no limit.")]
ACCOUNT = ("account", "own limits", "made", "disabled")
KEYS = ("key", "account", "name", "scope", "begins", "expires", "last used")


def whoami(as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Show whom your key speaks for, and what is left of its account's limits."""
    with options.connect(url, api_key) as client:
        me = client.people.me()
    if as_json:
        print_json(me.model_dump(mode="json"))
        return
    say(f"{me.owner}, scope {me.scope}" + (f", key {me.key_id}" if me.key_id else ", no key asked for"))
    used, limits = me.usage.model_dump(), me.limits.model_dump()
    print_table(("limit", "used", "of"), [(name, used[name], _limit(limits[name])) for name in limits])


@admin.command("bootstrap")
def bootstrap(
    name: Annotated[str, typer.Option(help="What the key is called in lists.")] = "bootstrap",
    force: Annotated[bool, typer.Option("--force", help="Also if there is an admin key already.")] = False,
) -> None:
    """Make the first admin key, on the server, with the settings (CFFA_*) of its API; it is printed this once."""
    from cffa_core.people.bootstrap import bootstrap as make

    settings = options.settings()
    known, made = make(settings, name=name, force=force)
    say(f"key {known.id} of {known.owner}, scope {known.scope.value}; nobody can look it up again:")
    typer.echo(made)
    if settings.mode == "embedded" and not settings.require_keys:
        say("this service asks for no keys; it does with CFFA_REQUIRE_KEYS=true")


@account.command("add")
def account_add(
    owner: OwnerName,
    active_jobs: ActiveJobs = None,
    pairs: Pairs = None,
    bytes_: Bytes = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Make an account; it has no key yet."""
    with options.connect(url, api_key) as client:
        made = client.people.create_account(owner, _given(active_jobs, pairs, bytes_))
    _show_accounts([made.model_dump(mode="json")], as_json=as_json)
    say(f"give it a key with: cffa admin key add {owner} --name LAPTOP")


@account.command("list")
def account_list(as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """List all accounts."""
    with options.connect(url, api_key) as client:
        found = [item.model_dump(mode="json") for item in client.people.accounts()]
    _show_accounts(found, as_json=as_json)


@account.command("limits")
def account_limits(
    owner: OwnerName,
    active_jobs: ActiveJobs = None,
    pairs: Pairs = None,
    bytes_: Bytes = None,
    reset: Annotated[bool, typer.Option("--reset", help="First forget the account's own: the service's hold.")] = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Show an account's limits and what it has of them; options change those they name."""
    given = _given(active_jobs, pairs, bytes_)
    with options.connect(url, api_key) as client:
        if given or reset:
            own = {} if reset else client.people.account(owner).limits
            client.people.set_limits(owner, own | given)
        found = client.people.account(owner)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    used, limits = found.usage.model_dump(), found.effective_limits.model_dump()
    rows = [(name, used[name], _limit(limits[name]), "own" if name in found.limits else "service") for name in limits]
    print_table(("limit", "used", "of", "set by"), rows, title=owner)


def _switch(action: Literal["disable", "enable"], text: str) -> None:
    def switched(owner: OwnerName, as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
        with options.connect(url, api_key) as client:
            people = client.people
            changed = people.disable_account(owner) if action == "disable" else people.enable_account(owner)
        _show_accounts([changed.model_dump(mode="json")], as_json=as_json)

    account.command(action, help=text)(switched)


_switch("disable", "Make all keys of an account worthless until it is enabled again; jobs and data stay.")
_switch("enable", "Let an account's keys count again.")


@key.command("add")
def key_add(
    owner: SomeOwner = None,
    name: Annotated[str, typer.Option(help="What the key is for.")] = "key",
    scope: Annotated[Literal["viewer", "researcher", "admin"], typer.Option(help="What it may do.")] = "researcher",
    days: Annotated[float | None, typer.Option(min=0, help="It expires after so many days; by default never.")] = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Make a key; it is printed this once, alone on standard output."""
    until = None if days is None else datetime.now(UTC) + timedelta(days=days)
    with options.connect(url, api_key) as client:
        made = client.people.create_key(name, scope=scope, owner=owner, expires_at=until)
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    say(f"key {made.id} of {made.owner}, scope {made.scope}; nobody can look it up again:")
    typer.echo(made.key)


@key.command("list")
def key_list(
    owner: SomeOwner = None,
    spent: Annotated[bool, typer.Option("--spent", help="Also those that were revoked or have expired.")] = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """List keys, newest first."""
    with options.connect(url, api_key) as client:
        found = list(client.people.keys(owner, spent=spent))
    if as_json:
        print_json([item.model_dump(mode="json") for item in found])
        return
    rows = [
        (
            item.id,
            item.owner,
            item.name,
            item.scope,
            item.shown,
            "revoked" if item.revoked_at else _day(item.expires_at),
            _day(item.last_used_at),
        )
        for item in found
    ]
    print_table(KEYS, rows)


@key.command("revoke")
def key_revoke(
    key_id: Annotated[str, typer.Argument(metavar="KEY_ID", help="Id of the key (key_...), not the key itself.")],
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Make a key worthless, for good."""
    with options.connect(url, api_key) as client:
        client.people.revoke_key(key_id)
    say(f"revoked {key_id}")


@admin.command("audit")
def audit(
    owner: Annotated[str | None, typer.Option(help="Who did it.")] = None,
    action: Annotated[str | None, typer.Option(help="Operation, e.g. postTrainingJob.")] = None,
    target: Annotated[str | None, typer.Option(help="Id of what it was done to.")] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Of the last so many days.")] = None,
    most: Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many entries.")] = 50,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Show who changed what, newest first."""
    since = None if days is None else datetime.now(UTC) - timedelta(days=days)
    with options.connect(url, api_key) as client:
        asked = client.people.audit(owner=owner, action=action, target=target, since=since)
        found = list(islice(asked, most))
    if as_json:
        print_json([item.model_dump(mode="json") for item in found])
        return
    rows = [(f"{item.at:%Y-%m-%d %H:%M:%S}", item.owner, item.key_id, item.action, item.target) for item in found]
    print_table(("at", "account", "key", "action", "target"), rows)


def _given(active_jobs: int | None, pairs: int | None, bytes_: int | None) -> dict[str, int]:
    named = {"active_jobs": active_jobs, "pairs": pairs, "bytes": bytes_}
    return {name: value for name, value in named.items() if value is not None}


def _show_accounts(found: list[dict[str, Any]], *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    rows = [
        (
            item["owner"],
            ", ".join(f"{name} {_limit(value)}" for name, value in sorted(item["limits"].items())),
            item["created_at"][:10],
            (item["disabled_at"] or "-")[:10],
        )
        for item in found
    ]
    print_table(ACCOUNT, rows)


def _limit(value: int) -> str:
    return str(value) if value else "no limit"


def _day(at: datetime | None) -> str | None:
    return None if at is None else f"{at:%Y-%m-%d}"


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(rich_help_panel="People")(whoami)
    admin.add_typer(account, name="account")
    admin.add_typer(key, name="key")
    app.add_typer(admin, name="admin", rich_help_panel="People")
