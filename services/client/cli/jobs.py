"""Commands that talk to a running service: submit, jobs, watch, download, and what can be done to a job."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cffa_core.errors import CffaError, InvalidSpec
from services.client.cli import options
from services.client.cli.export_files import byte_bars, print_export
from services.client.cli.options import Key, Url
from services.client.cli.report_files import download_report, print_report_files
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from services.client.client import CffaClient
    from services.client.resources import Job

submit = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Post a job to the service.")
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of the job.")]
Priority = Annotated[int, typer.Option(help="Among your own jobs, higher goes first.")]
Watch = Annotated[bool, typer.Option("--watch", help="Wait for the end, with a progress bar.")]


class JobFailed(CffaError):
    """A watched job ended without success."""

    code = "job_failed"


@submit.command("train")
def submit_train(
    dataset: Annotated[
        str | None, typer.Option(help="Id of a data set, or a folder or zip of pairs, which is uploaded first.")
    ] = None,
    method: options.Method = None,
    base: options.Base = None,
    resolution: options.Resolution = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    learning_rate: options.LearningRate = None,
    rank: options.Rank = None,
    timesteps: options.Timesteps = None,
    max_resolution: options.MaxResolution = None,
    step_range: options.StepRange = None,
    no_squeeze: options.NoSqueeze = False,
    vessels: options.Vessels = None,
    no_tile: options.NoTile = False,
    token: options.Token = None,
    token_steps: options.TokenSteps = None,
    holdout: options.Holdout = None,
    preview_pairs: options.PreviewPairs = None,
    every: options.EveryN = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    priority: Priority = 0,
    deadline: options.Deadline = None,
    keep_days: options.KeepDays = None,
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Post a training job on a data set."""
    settings = options.train_settings(
        spec,
        assignments,
        every=every,
        rank=rank,
        max_resolution=max_resolution,
        step_range=step_range,
        no_squeeze=no_squeeze,
        vessels=vessels,
        no_tile=no_tile,
        tokens=token,
        token_steps=token_steps,
        method=method,
        base=base,
        resolution=resolution,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        timesteps=timesteps,
        holdout=holdout,
        preview_pairs=preview_pairs,
        seed=seed,
    )
    source = options.reference(spec, "dataset_id", dataset)
    with options.connect(url, api_key) as client:
        dataset_id = source if source.startswith("ds_") else uploaded(client, Path(source))
        job = client.submit_training(dataset_id, settings, priority=priority, asked=options.terms(deadline, keep_days))
        posted(client, job, watch=watch, as_json=as_json)


@submit.command("generate")
def submit_generate(
    model: Annotated[str | None, typer.Option(help="Id of a model, or of the training job that made it.")] = None,
    count: options.Count = None,
    resolution: options.Resolution = None,
    scheduler: options.Scheduler = None,
    steps: options.SampleSteps = None,
    guidance: options.Guidance = None,
    noise: options.Noise = None,
    min_alignment: options.MinAlignment = None,
    max_similarity: options.MaxSimilarity = None,
    max_tries: options.MaxTries = None,
    tokens: options.DrawnTokens = None,
    batch_size: options.BatchSize = None,
    part_size: Annotated[int | None, typer.Option(help="Pairs per part (one archive each).")] = None,
    structures: Annotated[
        str | None,
        typer.Option(
            help="For a model of method controlnet: id, folder or zip of a data set whose vessels are drawn, or "
            "`procedural`."
        ),
    ] = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    priority: Priority = 0,
    deadline: options.Deadline = None,
    keep_days: options.KeepDays = None,
    watch: Watch = False,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Post a generation job for N pairs."""
    settings = options.generate_settings(
        spec,
        assignments,
        scheduler=scheduler,
        steps=steps,
        guidance=guidance,
        noise=noise,
        min_alignment=min_alignment,
        max_similarity=max_similarity,
        max_tries=max_tries,
        tokens=tokens,
        count=count,
        resolution=resolution,
        batch_size=batch_size,
        part_size=part_size,
        structures=options.structures(structures),
        seed=seed,
    )
    source = options.reference(spec, "model_id", model)
    with options.connect(url, api_key) as client:
        model_id = client.model_of(source).id if source.startswith("job_") else source
        drawn_on = None
        if settings.structures == "dataset":
            found = structures or options.field(spec, "structure_dataset_id")
            if not isinstance(found, str):
                raise InvalidSpec("the job needs --structures (or structure_dataset_id in the file of --spec)")
            drawn_on = found if found.startswith("ds_") else uploaded(client, Path(found))
        asked = options.terms(deadline, keep_days)
        job = client.submit_generation(
            model_id, settings, structure_dataset_id=drawn_on, priority=priority, asked=asked
        )
        posted(client, job, watch=watch, as_json=as_json)


def jobs(
    kind: Annotated[
        str | None, typer.Option(help="training | generation | edit | evaluation | export | attention | ...")
    ] = None,
    state: Annotated[str | None, typer.Option(help="queued | running | succeeded | failed | ...")] = None,
    after: Annotated[datetime | None, typer.Option(help="Posted then or later (UTC).")] = None,
    before: Annotated[datetime | None, typer.Option(help="Posted earlier (UTC).")] = None,
    model: Annotated[str | None, typer.Option(help="Whose spec names this model.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Whose spec names this data set.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, newest first.")] = 50,
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
    from cffa_core.jobs.spec import REPORTS
    from services.client.download import digest_of

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
    report = {"path": str(path), "bytes": archive.bytes, "sha256": digest_of(path), "pairs": archive.pairs}
    if as_json:
        print_json(report)
    else:
        print_table(("archive", "bytes", "pairs", "sha256"), [(path, archive.bytes, archive.pairs, archive.sha256)])


def upload(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or zip of pairs.")],
    name: Annotated[str | None, typer.Option(help="Name of the data set.")] = None,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
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


def follow(client: CffaClient, job_id: str) -> Job:
    """Say the states and draw the progress of a job until it is terminal; returns it."""
    state = None
    with progress_bars() as bars:
        for job in client.watch(job_id):
            if job.state != state:
                state = job.state
                place = f", place {job.queue_position} in the queue" if job.queue_position else ""
                say(f"{job.id}: {state}{place}")
            progress = job.progress
            if progress.total:
                bars(f"{job.kind}: {progress.stage}", progress.current, progress.total)
    return job


def uploaded(client: CffaClient, source: Path) -> str:
    """Upload a folder or zip of pairs with a progress bar; returns the data set's id."""
    with progress_bars() as bars:
        dataset = client.upload_dataset(source, on_bytes=lambda done, total: bars("uploading", done, total))
    say(f"data set {dataset.id}: {dataset.pairs} pairs")
    return dataset.id


def posted(client: CffaClient, job: Job, *, watch: bool, as_json: bool) -> None:
    """Say what became of a post, and follow the job if asked to."""
    if watch:
        say(f"job {job.id}")
        finished(follow(client, job.id), as_json=as_json)
    elif as_json:
        print_json(job.model_dump(mode="json"))
    else:
        print_table(("job", "kind", "state"), [(job.id, job.kind, job.state)])
        say(f"follow it with: cffa watch {job.id}")


def finished(job: Job, *, as_json: bool) -> None:
    """Say how a job ended; raises :class:`JobFailed` if it did not succeed."""
    if as_json:
        print_json(job.model_dump(mode="json"))
    if job.state != "succeeded":
        why = (job.error or {}).get("message") or job.reason or "no reason given"
        raise JobFailed(f"{job.id} is {job.state}: {why}")


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
