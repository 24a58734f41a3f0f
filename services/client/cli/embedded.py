"""Commands to start with: serve runs the embedded service on this machine, demo the main job, there or elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.client.cli import options, specification
from services.client.cli.terminal import progress_bars, say

if TYPE_CHECKING:
    from cffa_core.settings import Settings


def serve(
    host: Annotated[str, typer.Option(envvar="CFFA_HOST", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(envvar="CFFA_PORT", min=0, max=65535, help="Port; 0 for any free one.")] = 8008,
    home: Annotated[Path, typer.Option(envvar="CFFA_HOME", help="Folder of the record, objects and caches.")] = Path(
        "cffa-home"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    allow_remote: Annotated[
        bool, typer.Option(help="Listen beyond this machine, without keys: whoever reaches it may use it.")
    ] = False,
) -> None:
    """Run the API and a worker on this machine until Ctrl-C; both are restarted if they die."""
    import signal

    from services.client.servers import Servers

    settings = options.settings()  # names what is wrong with the environment here, not in the logs of the children
    tell = _notices(settings)
    servers = Servers(
        home,
        host=host,
        port=port,
        workers=workers,
        environment={"CFFA_ALLOW_REMOTE": "true"} if allow_remote else {},
        on_event=lambda name, text: tell(f"[{name}] {text}"),
    )
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: servers.interrupt())
    with servers:
        servers.wait_ready()
        if not servers.interrupted:
            tell(f"CFFA is at {servers.url} (home: {servers.home}); stop it with Ctrl-C")
        servers.wait()
        tell("stopping")


def _notices(settings: Settings) -> Callable[[str], None]:
    """How `serve` says something itself: a line for people, or one of the log where that is JSON."""
    if settings.log_format == "text":
        return say
    from cffa_core import logs

    logs.configure(settings)
    return logging.getLogger("cffa.serve").info


def demo(
    data: Annotated[
        Path | None, typer.Option(exists=True, help="Folder or zip of your own pairs, instead of 24 procedural ones.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results; default: a new temporary one.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for any free one.")] = 0,
    pairs: Annotated[int, typer.Option(min=1, max=512, help="Pairs to generate.")] = 8,
    resolution: Annotated[int, typer.Option(min=64, max=2048, help="Side of the images in pixels.")] = 512,
    base: Annotated[str, typer.Option(help="Base model.")] = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 60,
    seed: options.SetSeed = 42,
    url: Annotated[
        str,
        typer.Option(help="A running service to use (CFFA_URL is not read here).", rich_help_panel="Service"),
    ] = "",
    api_key: options.Key = "",
) -> None:
    """The main job, end to end: data set, training job, generation job, verified archive, contact sheet.

    Starts a service of its own for as long as it runs, unless --url names one.
    """
    from services.client.demo import DemoPlan, print_report, run_demo

    # What can never run is named now, not by a job five minutes later.
    specification.train_settings(None, None, base=base, resolution=resolution, steps=steps, seed=seed)
    options.settings()
    plan = DemoPlan(
        data=data,
        out=out,
        url=url,
        api_key=api_key,
        port=port,
        pairs=pairs,
        resolution=resolution,
        base=base,
        steps=steps,
        seed=seed,
    )
    with progress_bars() as bars:
        report = run_demo(plan, say, bars)
    print_report(report)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.command(rich_help_panel="Start here")(demo)
    app.command(rich_help_panel="Start here")(serve)
