"""Commands about a training that runs: job checkpoint, job sample, job previews."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.client.cli import options
from services.client.cli.jobs import JobId
from services.client.cli.options import Key, Url
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, say

job = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Ask something of a running training.")


@job.command("checkpoint")
def checkpoint(job_id: JobId, as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Make a checkpoint after the step in hand; the result of the training does not depend on it."""
    with options.connect(url, api_key) as client:
        asked = client.checkpoint_now(job_id)
    _say(asked.id, asked.wishes, asked.model_dump(mode="json"), as_json=as_json)


@job.command("sample")
def sample(job_id: JobId, as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Draw the preview pairs after the step in hand; look at them with `cffa job previews`."""
    with options.connect(url, api_key) as client:
        asked = client.sample_now(job_id)
    _say(asked.id, asked.wishes, asked.model_dump(mode="json"), as_json=as_json)


@job.command("previews")
def previews(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option("--out", "-o", file_okay=False, help="Folder for the sheets.")] = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """List the pictures that a training drew, and download the sheet of each step."""
    with options.connect(url, api_key) as client:
        found = client.previews(job_id)
        written = client.download_previews(job_id, out) if out is not None else []
    if as_json:
        print_json([preview.model_dump(mode="json") for preview in found])
        return
    rows = [(preview.step, "asked for" if preview.asked else "regular", len(preview.files)) for preview in found]
    print_table(("step", "why", "files"), rows)
    for path in written:
        say(str(path))


def _say(job_id: str, wishes: list[str], document: object, *, as_json: bool) -> None:
    if as_json:
        print_json(document)
    else:
        say(f"{job_id} was asked for: {', '.join(wishes) or 'nothing that it has not done already'}")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(job, name="job", rich_help_panel="A running service")
