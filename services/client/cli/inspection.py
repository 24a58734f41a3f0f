"""Commands that look closely: job events, job metrics, models, workers."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from services.client.cli import options
from services.client.cli.jobs import JobId
from services.client.cli.options import Key, Url
from services.client.cli.running_jobs import job
from services.client.cli.terminal import AsJson, print_json, print_table


@job.command("events")
def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is finished.")] = False,
    after: Annotated[int, typer.Option(min=0, help="Only events with a larger number.")] = 0,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """The history of a job: states, attempts, what went wrong. With --json one object per line."""
    with options.connect(url, api_key) as client:
        found = client.inspect.follow(job_id, after=after) if follow else client.inspect.events(job_id, after=after)
        for event in found:
            if as_json:
                typer.echo(event.model_dump_json())
            else:
                said = "  ".join(f"{name}={value}" for name, value in event.data.items())
                typer.echo(f"{event.seq:>5}  {event.at:%Y-%m-%d %H:%M:%S}  {event.type:<16} {said}")


@job.command("metrics")
def metrics(
    job_id: JobId,
    key: Annotated[str | None, typer.Option(help="One metric only, e.g. eps_cf.")] = None,
    since: Annotated[int, typer.Option(min=0, help="From this step on.")] = 0,
    as_json: AsJson = False,
    url: Url = options.DEFAULT_URL,
    api_key: Key = "",
) -> None:
    """Metrics of a training by step."""
    with options.connect(url, api_key) as client:
        found = client.inspect.metrics(job_id, key=key, since_step=since)
    if as_json:
        print_json([point.model_dump(mode="json") for point in found])
        return
    names = sorted({name for point in found for name in point.values})
    print_table(("step", *names), [(point.step, *(point.values.get(name) for name in names)) for point in found])


def models(
    limit: options.Limit = 50, as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = ""
) -> None:
    """List trained models, newest first."""
    with options.connect(url, api_key) as client:
        found = list(islice(client.models(), limit))
    if as_json:
        print_json([model.model_dump(mode="json") for model in found])
        return
    rows = [
        (
            model.id,
            model.method or model.family,
            model.base,
            model.step,
            f"{model.created_at:%Y-%m-%d %H:%M}",
            model.job_id,
        )
        for model in found
    ]
    print_table(("model", "method", "base", "step", "made (UTC)", "training job"), rows)


def workers(as_json: AsJson = False, url: Url = options.DEFAULT_URL, api_key: Key = "") -> None:
    """Workers that live, and what they are."""
    with options.connect(url, api_key) as client:
        found = client.inspect.workers()
    if as_json:
        print_json([worker.model_dump(mode="json") for worker in found])
        return
    rows = [
        (worker.id, worker.info.get("device"), ", ".join(worker.info.get("kinds", ())), f"{worker.seen_at:%H:%M:%S}")
        for worker in found
    ]
    print_table(("worker", "device", "kinds", "seen (UTC)"), rows)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for command in (models, workers):
        app.command(rich_help_panel="A running service")(command)
