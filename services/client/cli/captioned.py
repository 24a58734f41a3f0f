"""Commands of the captioned model that work here and now, without a service: train, draw, describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.client.cli import options, specification
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from cffa_core.jobs.captioned_spec import CaptionedSettings

captioned = typer.Typer(
    cls=TypedErrors, no_args_is_help=True, help="Text to picture and picture to text: the captioned model."
)
Out = Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder for what is made.")]
Modality = Annotated[str | None, typer.Option(help="Which image of each pair is learnt: cf | fa")]
Pictures = Annotated[int | None, typer.Option(help="Pictures per step.")]
Every = Annotated[int | None, typer.Option("--every", help="Validate and checkpoint every N steps.")]


@captioned.command()
def train(
    data: Annotated[
        Path, typer.Argument(metavar="DATA", exists=True, file_okay=False, help="Folder of pairs with captions.jsonl.")
    ],
    out: options.RunFolder,
    modality: Modality = None,
    steps: options.Steps = None,
    batch_size: Pictures = None,
    learning_rate: options.LearningRate = None,
    precision: Annotated[str | None, typer.Option(help="fp32 | bf16")] = None,
    holdout: options.Holdout = None,
    every: Every = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Train on pairs with captions; leaves logs and OUT/best_checkpoint."""
    from cffa_core.jobs.captioned_spec import CaptionedTrainSettings

    settings = specification.settings_of(
        CaptionedTrainSettings,
        spec,
        assignments,
        modality=modality,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        precision=precision,
        holdout=holdout,
        validate_every=every,
        checkpoint_every=every,
        seed=seed,
    )
    from cffa_core.jobs.context import FolderContext
    from cffa_core.recipes.captioned import run_captioned_training

    with progress_bars() as bars:
        context = FolderContext(out, lambda stage, done, total: bars(f"train: {stage}", done, total))
        card = run_captioned_training(settings, data, out, context, device=options.device(device))
    if as_json:
        print_json(card)
        return
    found = card.get("validation") or {}
    head = ("model", "step", "validation", "picture to text", "text to picture")
    row = (out / "best_checkpoint", card["step"], *map(found.get, ("loss", "image_to_text", "text_to_image")))
    print_table(head, [row])


@captioned.command()
def draw(
    model: options.ModelOrRun,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What is drawn, in words the model knows.")],
    out: Out,
    count: Annotated[int | None, typer.Option("--count", "-n", help="Pictures of each text.")] = None,
    steps: Annotated[int | None, typer.Option(help="DDIM steps, 10 to 100.")] = None,
    guidance: options.Guidance = None,
    direct: Annotated[bool, typer.Option("--direct", help="Without diffusion: decode the text's embedding.")] = False,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw pictures of texts into OUT/images, with a sheet and a report."""
    from cffa_core.jobs.captioned_spec import CaptionedSettings

    settings = specification.settings_of(
        CaptionedSettings,
        spec,
        assignments,
        task="text_to_image",
        texts=texts,
        images_per_text=count,
        ddim_steps=steps,
        guidance_scale=guidance,
        use_diffusion=False if direct else None,
        seed=seed,
    )
    _print(_run(settings, model, None, out, device), out, as_json)


@captioned.command()
def describe(
    model: options.ModelOrRun,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", exists=True, help="Pairs whose pictures of the model's modality count.")
    ],
    out: Out,
    captions: Annotated[int | None, typer.Option("--captions", "-n", help="Captions of each picture.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Below 1: likely words are drawn more often.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of the likeliest K words alone; 0: of all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the likeliest words that have this share together.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: words that were said come less.")] = None,
    max_images: Annotated[int | None, typer.Option(help="Of more pictures the first are described.")] = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Describe the pictures of a folder of pairs; leaves OUT/captions.jsonl, a sheet and a report."""
    from cffa_core.jobs.captioned_spec import CaptionedSettings

    settings = specification.settings_of(
        CaptionedSettings,
        spec,
        assignments,
        task="image_to_text",
        captions=captions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        max_images=max_images,
        seed=seed,
    )
    _print(_run(settings, model, folder, out, device), out, as_json)


def _run(settings: CaptionedSettings, model: Path, folder: Path | None, out: Path, device: str) -> dict[str, Any]:
    from cffa_core.recipes.captioned import run_captioned

    best = model / "best_checkpoint"
    with progress_bars() as bars:
        found = best if best.is_dir() else model
        return run_captioned(settings, found, folder, out, bars, device=options.device(device))


def _print(report: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print_json(report)
        return
    print_table(("pictures", "written"), [(report["pictures"], out)])
    for name, found in (report.get("against_known") or {}).items():
        print_table((name, "low", "high", "N"), [(found["value"], found["low"], found["high"], found["n"])])


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(captioned, name="captioned", rich_help_panel="On this machine, without a service")
