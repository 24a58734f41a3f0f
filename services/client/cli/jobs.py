"""Commands on the jobs of a running service: jobs, watch, download, and what can be done to one; and `cffa upload`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.client.cli import options
from services.client.cli.export_files import byte_bars, print_export
from services.client.cli.following import finished, follow
from services.client.cli.options import Key, Url
from services.client.cli.report_files import download_report, print_report_files
from services.client.cli.submit import submit
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from services.client.resources import Job

JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]


def jobs(
    kind: Annotated[
        str | None, typer.Option(help="training | generation | edit | evaluation | export | attention | ...")
    ] = None,
    state: Annotated[str | None, typer.Option(help="queued | running | succeeded | failed | ...")] = None,
    after: Annotated[datetime | None, typer.Option(help="Posted then or later (UTC).")] = None,
    before: Annotated[datetime | None, typer.Option(help="Posted earlier (UTC).")] = None,
    model: Annotated[str | None, typer.Option(help="Whose spec names this model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Whose spec names this data set.")] = None,
    limit: options.Limit = 50,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """List jobs, newest first."""
    from itertools import islice

    from cffa_core.jobs.records import JobFilter
    from cffa_core.jobs.spec import Kind
    from cffa_core.jobs.state import JobState

    with options.connect(url, api_key) as client:
        found = client.jobs(
            kind=_choice("--kind", Kind, kind) if kind else None,
            state=_choice("--state", JobState, state) if state else None,
            within=JobFilter(
                created_after=after and after.replace(tzinfo=UTC),
                created_before=before and before.replace(tzinfo=UTC),
                model_id=model,
                dataset_id=dataset,
            ),
        )
        listed = list(islice(found, limit))
    if as_json:
        print_json([job.model_dump(mode="json") for job in listed])
        return
    rows = [
        (job.id, job.kind, job.state, _how_far(job), f"{job.created_at:%Y-%m-%d %H:%M}", job.reason or "")
        for job in listed
    ]
    print_table(("job", "kind", "state", "progress", "posted (UTC)", "reason"), rows)


def watch(job_id: JobId, as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Follow a job to its end with a progress bar; exit code 1 if it does not succeed."""
    with options.connect(url, api_key) as client:
        finished(follow(client, job_id), as_json=as_json)


def download(
    job_id: JobId,
    out: Annotated[Path, typer.Option("--out", "-o", help="File, or folder to put the download into.")] = Path(),
    part: Annotated[int | None, typer.Option(min=0, help="One part only; parts are there while the job runs.")] = None,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Download the archive of a generation job, an export, or the report of a job that makes one; goes on where it
    broke off."""
    from cffa_core.disk_files import sha256_of
    from cffa_core.jobs.spec import REPORTS

    with options.connect(url, api_key) as client, progress_bars() as bars:
        kind = client.job(job_id).kind
        if kind in REPORTS:
            print_report_files(*download_report(client, job_id, out, bars), as_json=as_json)
            return
        if kind == "export" and part is None:
            print_export(client.download_export(job_id, out, on_bytes=byte_bars(bars)), out, as_json=as_json)
            return
        archive = client.download_archive(
            job_id, out, part=part, on_bytes=lambda done, total: bars("downloading", done, total)
        )
    path = out / archive.filename if out.is_dir() else out
    report = {"path": str(path), "bytes": archive.bytes, "sha256": sha256_of(path), "pairs": archive.pairs}
    if as_json:
        print_json(report)
    else:
        print_table(("archive", "bytes", "pairs", "sha256"), [(path, archive.bytes, archive.pairs, archive.sha256)])


def upload(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or zip of pairs.")],
    name: Annotated[str | None, typer.Option(help="Name of the data set.")] = None,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
    auto_register: options.AutoRegister = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Upload a folder or zip of pairs; every problem of every file is named if it is refused."""
    with options.connect(url, api_key) as client, progress_bars() as bars:
        dataset = client.upload_dataset(
            source,
            name,
            lambda done, total: bars("uploading", done, total),
            eye_pattern=eye_pattern,
            patient_pattern=patient_pattern,
            auto_register=auto_register,
        )
    if as_json:
        print_json(dataset.model_dump(mode="json"))
    else:
        print_table(
            ("data set", "name", "pairs", "digest"), [(dataset.id, dataset.name, dataset.pairs, dataset.digest)]
        )


def _make_action(name: str, doc: str) -> Any:
    def action(job_id: JobId, as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
        with options.connect(url, api_key) as client:
            job = getattr(client, name)(job_id)
        if as_json:
            print_json(job.model_dump(mode="json"))
        else:
            say(f"{job.id} is {job.state}")

    action.__doc__ = doc
    return action


def delete(job_id: JobId, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Remove a finished job and what it made."""
    with options.connect(url, api_key) as client:
        client.delete(job_id)
    say(f"{job_id} is deleted")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    panel = "A running service"
    app.add_typer(submit, name="submit", rich_help_panel=panel)
    for command in (jobs, watch, download, upload, delete):
        app.command(rich_help_panel=panel)(command)
    for name, doc in (
        ("cancel", "Stop a job; finished parts are kept."),
        ("pause", "Stop a job for now."),
        ("resume", "Put a paused job back into the queue."),
        ("retry", "Put a failed or cancelled job back into the queue; what it has done is kept."),
    ):
        app.command(name, rich_help_panel=panel)(_make_action(name, doc))


def _how_far(job: Job) -> str:
    if job.terminal or not job.progress.total:
        counts = job.counts
        if counts.accepted or counts.rejected:
            return f"{counts.accepted} of {counts.requested} accepted"
        return f"{counts.generated} pairs" if counts.generated else ""
    return f"{job.progress.stage} {job.progress.current}/{job.progress.total}"


def _choice(option: str, kind: Any, value: str) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        raise typer.BadParameter(f"{value!r} is none of {', '.join(kind)}", param_hint=option) from error
