"""``cffa submit captioned-train`` and ``cffa submit captioned``: post jobs of the captioned model to a service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cffa_core.errors import InvalidSpec
from services.client.cli import options, specification
from services.client.cli.captioned import Every, Modality, Pictures
from services.client.cli.options import Key, Priority, Url, Watch
from services.client.cli.submit import dataset_of, model_of, posted, submit
from services.client.cli.terminal import AsJson

Dataset = Annotated[str | None, typer.Option(help="Id of a data set, or a folder or zip, which is uploaded first.")]


def submit_captioned_training(
    dataset: Dataset = None,
    modality: Modality = None,
    steps: options.Steps = None,
    batch_size: Pictures = None,
    learning_rate: options.LearningRate = None,
    holdout: options.Holdout = None,
    every: Every = None,
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
    """Post a training of the captioned model on a data set that has captions.jsonl."""
    from cffa_core.jobs.spec import CaptionedTrainSettings

    settings = specification.settings_of(
        CaptionedTrainSettings,
        spec,
        assignments,
        modality=modality,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        holdout=holdout,
        validate_every=every,
        checkpoint_every=every,
        seed=seed,
    )
    source = specification.reference(spec, "dataset_id", dataset)
    with options.connect(url, api_key) as client:
        job = client.submit_captioned_training(
            dataset_of(client, source), settings, priority=priority, asked=specification.terms(deadline, keep_days)
        )
        posted(client, job, watch=watch, as_json=as_json)


def submit_captioned(
    model: Annotated[str | None, typer.Option(help="Id of a captioned model, or of the job that trained it.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text that is drawn; may be repeated.")] = None,
    texts: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with a text to draw in each line.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of texts: id, folder or zip of a data set whose images are captioned.")
    ] = None,
    per_text: Annotated[int | None, typer.Option(help="Images per text.")] = None,
    ddim_steps: options.SampleSteps = None,
    guidance: options.Guidance = None,
    no_diffusion: Annotated[bool, typer.Option("--no-diffusion", help="Decode the text's embedding directly.")] = False,
    captions: Annotated[int | None, typer.Option(help="Captions per image.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Of a larger data set the first are captioned.")] = None,
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
    """Post the drawing of texts, or the captioning of a data set's images; `cffa download ID` fetches the report."""
    from cffa_core.jobs.spec import CaptionedSettings

    given = [*(text or ()), *(_lines(texts) if texts is not None else ())]
    source = dataset or specification.field(spec, "dataset_id")
    if given and source:
        raise InvalidSpec("name what is drawn (--text, --texts) or what is captioned (--dataset), one of the two")
    task = "text_to_image" if given else "image_to_text" if source else None
    settings = specification.settings_of(
        CaptionedSettings,
        spec,
        assignments,
        task=task,
        texts=given or None,
        images_per_text=per_text,
        ddim_steps=ddim_steps,
        guidance_scale=guidance,
        use_diffusion=False if no_diffusion else None,
        captions=captions,
        max_images=max_images,
        seed=seed,
    )
    named = specification.reference(spec, "model_id", model)
    with options.connect(url, api_key) as client:
        model_id = model_of(client, named)
        job = client.submit_captioned(
            model_id,
            settings,
            dataset_id=None if source is None else dataset_of(client, str(source)),
            priority=priority,
            asked=specification.terms(deadline, keep_days),
        )
        posted(client, job, watch=watch, as_json=as_json)


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSpec(f"{path} cannot be read as UTF-8 text: {error}") from error


def register(app: typer.Typer) -> None:
    """Add these commands to those of ``cffa submit``."""
    submit.command("captioned-train")(submit_captioned_training)
    submit.command("captioned")(submit_captioned)
