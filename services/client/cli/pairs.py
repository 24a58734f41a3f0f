"""Commands about single pairs of a generation job: pair regenerate, pair rejects."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from services.client.cli import options
from services.client.cli.following import JobFailed, follow
from services.client.cli.jobs import JobId
from services.client.cli.options import Key, Url, Watch
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, say

if TYPE_CHECKING:
    from services.client.resources import Job

pair = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Single pairs of a generation job.")


@pair.command("regenerate")
def regenerate(
    job_id: JobId,
    index: Annotated[int, typer.Argument(min=0, help="Index of the pair.")],
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Make one pair once more; with --watch, exit code 1 unless both files are the same to the last bit."""
    with options.connect(url, api_key) as client:
        job = client.regenerate(job_id, index)
        if watch:
            job = follow(client, job.id)
    if as_json:
        print_json(job.model_dump(mode="json"))
    if watch:
        _say_whether_it_is_the_same(job, as_json=as_json)
    elif not as_json:
        print_table(("job", "kind", "state"), [(job.id, job.kind, job.state)])
        say(f"whether the pair is the same is in its result: cffa watch --json {job.id}")


@pair.command("rejects")
def rejects(
    job_id: JobId,
    out: Annotated[Path | None, typer.Option("--out", "-o", file_okay=False, help="Folder for their archives.")] = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """List the pairs that the gate refused, and the slots that stayed empty; with --out, download the pairs."""
    with options.connect(url, api_key) as client:
        refused, empty = list(client.rejects(job_id)), list(client.exhausted(job_id))
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            for part in sorted({entry.part for entry in refused}):
                client.download_rejects(job_id, out, part)
    if as_json:
        listed = [entry.model_dump(mode="json", by_alias=True) for entry in refused]
        print_json({"rejects": listed, "exhausted": [slot.model_dump(mode="json") for slot in empty]})
        return
    rows = [
        (
            entry.index,
            entry.attempt,
            ", ".join(entry.reasons),
            "-" if entry.alignment is None else entry.alignment["ridge_correlation"],
            "-" if entry.novelty is None else entry.novelty.similarity,
        )
        for entry in refused
    ]
    print_table(("pair", "try", "refused because", "ridge correlation", "similarity to training"), rows)
    if empty:
        say(f"slots that stayed empty: {', '.join(str(slot.index) for slot in empty)}")


def _say_whether_it_is_the_same(job: Job, *, as_json: bool) -> None:
    """Raises ``JobFailed`` unless the job succeeded with the same bytes."""
    found = (job.result or {}).get("regenerated")
    if job.state != "succeeded" or found is None:
        raise JobFailed(
            f"{job.id} is {job.state}: {(job.error or {}).get('message') or job.reason or 'no reason given'}"
        )
    if not found["same"]:
        raise JobFailed(f"pair {found['index']} came out with other bytes than in {found['job_id']}; see {job.id}")
    if not as_json:
        say(f"pair {found['index']} of {found['job_id']} is the same to the last bit")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(pair, name="pair", rich_help_panel="A running service")
