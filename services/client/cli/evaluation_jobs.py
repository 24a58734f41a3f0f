"""``cffa submit evaluate``: post the measuring of pairs to a service. ``cffa evaluate`` measures on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cffa_core.errors import InvalidSpec
from services.client.cli import options, specification
from services.client.cli.options import Key, Priority, Url, Watch
from services.client.cli.submit import dataset_of, posted, submit
from services.client.cli.terminal import AsJson


def submit_evaluate(
    pairs: Annotated[
        str | None,
        typer.Option(help="What is measured: id of a generation job or data set, or a folder or zip of pairs."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Real pairs that no training has seen: id of a data set, or a folder or zip.")
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Training pairs, for memorisation; a generation job's are known unless they are deleted."),
    ] = None,
    extractor: Annotated[str | None, typer.Option(help="Features: filters (no weights) | vit")] = None,
    extractor_model: Annotated[
        str | None, typer.Option(help="With vit: folder of the transformer in the service's CFFA_MODELS_DIR.")
    ] = None,
    base: options.VaeBase = None,
    max_pairs: Annotated[int | None, typer.Option(help="Measure at most so many pairs, a seeded choice.")] = None,
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
    """Post an evaluation of pairs against real ones; `cffa download ID` fetches its report."""
    settings = specification.evaluate_settings(
        spec,
        assignments,
        extractor=extractor,
        extractor_model=extractor_model,
        base=base,
        max_pairs=max_pairs,
        seed=seed,
    )
    measured = pairs or _named(spec, "generation_job_id") or _named(spec, "pairs_dataset_id")
    if measured is None:
        raise InvalidSpec("the job needs --pairs (or generation_job_id or pairs_dataset_id in the file of --spec)")
    real = specification.reference(spec, "reference_dataset_id", reference)
    learnt = train or _named(spec, "train_dataset_id")
    with options.connect(url, api_key) as client:
        of_job = measured.startswith("job_")
        job = client.submit_evaluation(
            settings,
            generation_job_id=measured if of_job else None,
            pairs_dataset_id=None if of_job else dataset_of(client, measured),
            reference_dataset_id=dataset_of(client, real),
            train_dataset_id=None if learnt is None else dataset_of(client, learnt),
            priority=priority,
            asked=specification.terms(deadline, keep_days),
        )
        posted(client, job, watch=watch, as_json=as_json)


def _named(spec: Path | None, name: str) -> str | None:
    """An id in the file of ``--spec``, if there is one."""
    found = specification.field(spec, name)
    return found if isinstance(found, str) else None


def register(app: typer.Typer) -> None:
    """Add this command to those of ``cffa submit``."""
    submit.command("evaluate")(submit_evaluate)
