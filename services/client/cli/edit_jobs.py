"""``cffa submit edit``: post the editing of pairs to a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cffa_core.errors import InvalidSpec
from services.client.cli import options, specification
from services.client.cli.edit_options import Add, Mask, Remove, Skip, Strength, Threshold, Warmup, edit_terms
from services.client.cli.options import Key, Priority, Url, Watch
from services.client.cli.submit import model_of, posted, submit, uploaded
from services.client.cli.terminal import AsJson

NOT_YET = "ds_" + "0" * 20
"""Stands for a data set that is uploaded once everything else is known to be right."""


def submit_edit(
    dataset: Annotated[
        str | None, typer.Option(help="What is edited: id of a data set, or a folder or zip of pairs (one is enough).")
    ] = None,
    job: Annotated[str | None, typer.Option(help="Or: id of a succeeded generation or edit job.")] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="Of the data set, this pair alone; may be repeated. Default: all.")
    ] = None,
    pair: Annotated[
        list[int] | None, typer.Option(help="Of the job, the pair of this index alone; may be repeated. Default: all.")
    ] = None,
    area: Annotated[
        str | None, typer.Option(help="Of the data set, a mask that came with each pair: nothing outside changes.")
    ] = None,
    add: Add = None,
    remove: Remove = None,
    mask: Mask = None,
    strength: Strength = None,
    threshold: Threshold = None,
    warmup: Warmup = None,
    model: Annotated[
        str | None, typer.Option(help="Id of a model, or of the training job that made it. Default: the base alone.")
    ] = None,
    base: options.Base = None,
    resolution: options.Resolution = None,
    steps: options.SampleSteps = None,
    skip: Skip = None,
    part_size: options.PartSize = None,
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
    """Post the editing of pairs by text; `cffa download ID` fetches the new pairs with masks and sheets."""
    from cffa_core.jobs.spec import EditSpec

    if dataset is None and job is None:
        dataset, job = specification.field(spec, "dataset_id"), specification.field(spec, "generation_job_id")
    if (dataset is None) == (job is None):
        raise InvalidSpec("the job needs --dataset or --job, one of the two (or their ids in the file of --spec)")
    learnt = model or specification.field(spec, "model_id")
    here = dataset is not None and not dataset.startswith("ds_")
    fields: dict[str, object] = {
        "dataset_id": NOT_YET if here else dataset,
        "generation_job_id": job,
        "names": name or None,
        "pair_indices": pair or None,
        "area": area,
        "edits": edit_terms(spec, add, remove, {"strength": strength, "threshold": threshold, "warmup": warmup}),
        "mask": mask,
        "base": base,
        "resolution": resolution,
        "steps": steps,
        "skip": skip,
        "part_size": part_size,
        "seed": seed,
    }
    asked = specification.settings_of(EditSpec, spec, assignments, **fields)
    with options.connect(url, api_key) as client:
        if learnt is not None:
            model_id = model_of(client, learnt)
            asked = specification.settings_of(EditSpec, spec, assignments, **fields, model_id=model_id)
        # The count of a stored job's spec is of other pairs, perhaps; the service counts.
        asked = asked.model_copy(update={"count": 0})
        if here and dataset is not None:
            asked = asked.model_copy(update={"dataset_id": uploaded(client, Path(dataset))})
        made = client.submit_edit(asked, priority=priority, asked=specification.terms(deadline, keep_days))
        posted(client, made, watch=watch, as_json=as_json)


def register(app: typer.Typer) -> None:
    """Add this command to those of ``cffa submit``."""
    submit.command("edit")(submit_edit)
