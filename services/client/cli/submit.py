"""``cffa submit``: posting trainings and generations to a service, and what all kinds of posts share.

The other kinds are in ``*_jobs``, a file each; what can be done to a job once it is posted is in ``jobs``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cffa_core.errors import InvalidSpec
from services.client.cli import options, specification
from services.client.cli.following import finished, follow
from services.client.cli.options import Key, Priority, Url, Watch
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from services.client.client import CffaClient
    from services.client.resources import Job

submit = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Post a job to the service.")


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
    settings = specification.train_settings(
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
    source = specification.reference(spec, "dataset_id", dataset)
    with options.connect(url, api_key) as client:
        dataset_id = dataset_of(client, source)
        job = client.submit_training(
            dataset_id, settings, priority=priority, asked=specification.terms(deadline, keep_days)
        )
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
    part_size: options.PartSize = None,
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
    settings = specification.generate_settings(
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
        structures=specification.structures(structures),
        seed=seed,
    )
    source = specification.reference(spec, "model_id", model)
    with options.connect(url, api_key) as client:
        model_id = model_of(client, source)
        drawn_on = None
        if settings.structures == "dataset":
            found = structures or specification.field(spec, "structure_dataset_id")
            if not isinstance(found, str):
                raise InvalidSpec("the job needs --structures (or structure_dataset_id in the file of --spec)")
            drawn_on = dataset_of(client, found)
        asked = specification.terms(deadline, keep_days)
        job = client.submit_generation(
            model_id, settings, structure_dataset_id=drawn_on, priority=priority, asked=asked
        )
        posted(client, job, watch=watch, as_json=as_json)


def dataset_of(client: CffaClient, source: str) -> str:
    """Id of the data set that ``source`` names; a folder or zip of pairs is uploaded first."""
    return source if source.startswith("ds_") else uploaded(client, Path(source))


def model_of(client: CffaClient, source: str) -> str:
    """Id of the model that ``source`` names: its own, or that of the training job that made it."""
    return client.model_of(source).id if source.startswith("job_") else source


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
