"""Commands on web hooks: webhook add, list, change, remove, deliveries, redeliver, test, rotate, listen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cffa_core.errors import InvalidSpec
from services.client.cli import options
from services.client.cli.options import Key, Url
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, say

if TYPE_CHECKING:
    from services.client.webhooks import Delivery, Webhook

webhook = typer.Typer(
    cls=TypedErrors, no_args_is_help=True, help="Web hooks: have an address told what happens to jobs and data sets."
)
WebhookId = Annotated[str, typer.Argument(metavar="ID", help="Id of the web hook.")]
Events = Annotated[
    list[str] | None,
    typer.Option("--event", help="What it is told, e.g. job.succeeded; may be repeated. None given: everything."),
]
SECRET_ONCE = "keep the secret now, it is not shown again:"


@webhook.command("add")
def add(
    address: Annotated[str, typer.Argument(metavar="ADDRESS", help="https address that messages are posted to.")],
    events: Events = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Make a web hook; its id and its secret are printed, the secret for the only time."""
    with options.connect(url, api_key) as client:
        made = client.webhooks.create(address, events or ())
    if as_json:
        print_json(made.model_dump(mode="json"))
        return
    say(f"web hook {made.id} is told {', '.join(made.events) or 'everything'}; {SECRET_ONCE}")
    typer.echo(made.secret)


@webhook.command("list")
def list_(as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """List web hooks."""
    with options.connect(url, api_key) as client:
        _print_hooks(list(client.webhooks.all()), as_json)


@webhook.command("change")
def change(
    webhook_id: WebhookId,
    address: Annotated[str | None, typer.Option(help="Another address.")] = None,
    events: Events = None,
    everything: Annotated[bool, typer.Option("--everything", help="Tell it everything.")] = False,
    on: Annotated[bool | None, typer.Option("--on/--off", help="Switch it on or off.")] = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Change a web hook; what is not named stays."""
    if events and everything:
        raise InvalidSpec("name events with --event, or take --everything")
    wanted = [] if everything else events or None
    with options.connect(url, api_key) as client:
        _print_hooks([client.webhooks.update(webhook_id, url=address, events=wanted, enabled=on)], as_json)


@webhook.command("remove")
def remove(webhook_id: WebhookId, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Remove a web hook and the list of what was sent to it."""
    with options.connect(url, api_key) as client:
        client.webhooks.delete(webhook_id)
    say(f"{webhook_id} is removed")


@webhook.command("rotate")
def rotate(
    webhook_id: WebhookId,
    drop_previous: Annotated[
        bool, typer.Option("--drop-previous", help="Sign with the new secret alone, from now on.")
    ] = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Print a new secret; messages are signed with the previous one too, until the next rotation."""
    with options.connect(url, api_key) as client:
        secret = client.webhooks.rotate_secret(webhook_id, keep_previous=not drop_previous)
    say(SECRET_ONCE)
    typer.echo(secret)


@webhook.command("test")
def test(
    webhook_id: WebhookId,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the outcome.")] = 30.0,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Send a test message and say what came of it."""
    with options.connect(url, api_key) as client:
        sent = client.webhooks.test(webhook_id)
        _print_deliveries([client.webhooks.wait(webhook_id, sent.id, timeout=timeout)], as_json)


@webhook.command("deliveries")
def deliveries(
    webhook_id: WebhookId,
    state: Annotated[str | None, typer.Option(help="waiting | sending | delivered | failed")] = None,
    limit: options.Limit = 50,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """List what was sent to a web hook, or waits to be."""
    with options.connect(url, api_key) as client:
        found = client.webhooks.deliveries(webhook_id, state=state)
        _print_deliveries([item for item, _ in zip(found, range(limit), strict=False)], as_json)


@webhook.command("redeliver")
def redeliver(
    webhook_id: WebhookId,
    delivery: Annotated[str, typer.Argument(metavar="DELIVERY", help="Id of the delivery.")],
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Send a message again, under the same webhook-id."""
    with options.connect(url, api_key) as client:
        _print_deliveries([client.webhooks.redeliver(webhook_id, delivery)], as_json)


@webhook.command("listen")
def listen(
    secret: Annotated[
        str, typer.Option(envvar="CFFA_WEBHOOK_SECRET", help="Secret of the web hook; better not on the command line.")
    ] = "",
    secret_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File that holds the secret.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 9009,
) -> None:
    """Receive messages on this machine, check their signatures, and print one JSON line each, until interrupted."""
    import json

    from services.client.webhook_listener import Listener

    found = secret_file.read_text(encoding="utf-8").strip() if secret_file is not None else secret
    if not found:
        raise InvalidSpec("name the secret of the web hook: CFFA_WEBHOOK_SECRET or --secret-file")
    listener = Listener(
        host,
        port,
        found,
        on_message=lambda message_id, message: typer.echo(json.dumps({"webhook_id": message_id, **message})),
        on_refusal=lambda why: say(f"refused: {why}"),
    )
    say(f"listening on http://{host}:{listener.port}/")
    try:
        listener.serve_forever()
    except KeyboardInterrupt:
        say("ended")
    finally:
        listener.server_close()


def _print_hooks(hooks: list[Webhook], as_json: bool) -> None:
    if as_json:
        print_json([hook.model_dump(mode="json", exclude={"secret"}) for hook in hooks])
        return
    rows = [
        (hook.id, hook.url, ", ".join(hook.events) or "everything", "on" if hook.enabled else "off", hook.reason)
        for hook in hooks
    ]
    print_table(("id", "address", "is told", "state", "why off"), rows)


def _print_deliveries(found: list[Delivery], as_json: bool) -> None:
    if as_json:
        print_json([delivery.model_dump(mode="json") for delivery in found])
        return
    rows = [
        (
            delivery.id,
            delivery.type,
            delivery.state,
            delivery.tries,
            delivery.error or delivery.status,
            delivery.created_at.strftime("%Y-%m-%d %H:%M:%S"),
        )
        for delivery in found
    ]
    print_table(("id", "type", "state", "tries", "last answer", "made"), rows)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(webhook, name="webhook", rich_help_panel="A running service")
