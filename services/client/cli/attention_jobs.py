"""``cffa submit attention``: post a look into a model's attention. ``cffa attention`` looks on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from services.client.cli import options, specification
from services.client.cli.attention import Index, MapKinds, MapResolution, Points, Words, point_of
from services.client.cli.options import Key, Priority, Url, Watch
from services.client.cli.submit import model_of, posted, submit
from services.client.cli.terminal import AsJson


def submit_attention(
    model: Annotated[str | None, typer.Option(help="Id of a pair model, or of the training job that made it.")] = None,
    index: Index = None,
    token: Words = None,
    kind: MapKinds = None,
    point: Points = None,
    resolution: options.Resolution = None,
    scheduler: options.Scheduler = None,
    steps: options.SampleSteps = None,
    guidance: options.Guidance = None,
    map_resolution: MapResolution = None,
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
    """Post a look into where a model looks while it draws one pair; `cffa download ID` fetches the report."""
    from cffa_core.jobs.spec import AttentionSettings

    fields: dict[str, object] = {
        "index": index,
        "tokens": token or None,
        "kinds": kind or None,
        "points": [point_of(text) for text in point] if point else None,
        "resolution": resolution,
        "map_resolution": map_resolution,
        "seed": seed,
        "sampler.scheduler": scheduler,
        "sampler.steps": steps,
        "sampler.guidance_scale": guidance,
    }
    settings = specification.settings_of(AttentionSettings, spec, assignments, **fields)
    source = specification.reference(spec, "model_id", model)
    with options.connect(url, api_key) as client:
        model_id = model_of(client, source)
        job = client.submit_attention(
            model_id, settings, priority=priority, asked=specification.terms(deadline, keep_days)
        )
        posted(client, job, watch=watch, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add this command to those of ``cffa submit``."""
    submit.command("attention")(submit_attention)
