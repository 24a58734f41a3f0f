"""``cffa export``: chosen pairs as zip, WebDataset shards or DICOM files, of a job on a service or an archive here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cffa_core.errors import InvalidSpec, Problem
from services.client.cli import options, specification
from services.client.cli.export_files import byte_bars, print_export
from services.client.cli.following import finished, follow
from services.client.cli.options import Key, Priority, Url
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from cffa_core.jobs.spec import ExportSettings

MOST_NAMED = 100_000


def export(
    source: Annotated[
        str, typer.Argument(metavar="JOB|PATH", help="Id of a generation job, or an archive (zip or folder) it made.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder for the archives.")],
    form: Annotated[Literal["zip", "webdataset", "dicom"], typer.Option(help="Form of the archives.")] = "zip",
    accepted_only: Annotated[
        bool, typer.Option("--accepted-only", help="Pairs that the job's gate let through; it must have one.")
    ] = False,
    pairs: Annotated[
        str | None, typer.Option(metavar="0-99,120", help="Pairs by number; ranges include their ends.")
    ] = None,
    min_alignment: Annotated[float | None, typer.Option(help="Least alignment score of CF and FA.")] = None,
    max_similarity: Annotated[
        float | None, typer.Option(help="Largest similarity to the nearest training pair, 0..1.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Pairs per archive.")] = 1000,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Only post it; cffa download ID -o OUT fetches it later.")
    ] = False,
    priority: Priority = 0,
    deadline: options.Deadline = None,
    keep_days: options.KeepDays = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Export pairs of a generation job, also while it runs, or of a downloaded archive (without a service)."""
    settings = specification.export_settings(
        form,
        shard_size,
        accepted_only=accepted_only or None,
        min_alignment=min_alignment,
        max_similarity_to_training=max_similarity,
        **(_chosen(pairs) if pairs else {}),
    )
    if not source.startswith("job_"):
        _export_here(Path(source), out, settings, as_json=as_json)
        return
    with options.connect(url, api_key) as client:
        asked = specification.terms(deadline, keep_days)
        job = client.submit_export(source, settings, priority=priority, asked=asked)
        if no_wait:
            if as_json:
                print_json(job.model_dump(mode="json"))
            else:
                print_table(("job", "kind", "state"), [(job.id, job.kind, job.state)])
                say(f"fetch it with: cffa download {job.id} -o {out}")
            return
        finished(follow(client, job.id), as_json=False)
        with progress_bars() as bars:
            found = client.download_export(job.id, out, on_bytes=byte_bars(bars))
        print_export(found, out, as_json=as_json)


def _chosen(text: str) -> dict[str, object]:
    """``0-99`` as a range, anything longer as numbers."""
    runs: list[range] = []
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or (dash and int(last) < int(first)):
            message = f"--pairs takes numbers and ranges such as 0-99,120, not {word!r}"
            raise InvalidSpec(message, problems=(Problem("/selection/indices", "bad_range", message),))
        runs.append(range(int(first), int(last if dash else first) + 1))
    if len(runs) == 1:
        return {"first": runs[0][0], "last": runs[0][-1]}
    if sum(map(len, runs)) > MOST_NAMED:
        message = f"--pairs names more than {MOST_NAMED} pairs; take one range, or several exports"
        raise InvalidSpec(message, problems=(Problem("/selection/indices", "too_long", message),))
    return {"indices": [index for run in runs for index in run]}


def _export_here(source: Path, out: Path, settings: ExportSettings, *, as_json: bool) -> None:
    from cffa_core.recipes.export_archive import export_archive

    with progress_bars() as bars:
        files = export_archive(source, out, settings, bars)
    if as_json:
        print_json({"out": str(out), "files": files})
        return
    rows = [(out / file["name"], file["pairs"], file["size"], file["sha256"]) for file in files]
    print_table(("archive", "pairs", "bytes", "sha256"), rows)


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command(rich_help_panel="A running service")(export)
