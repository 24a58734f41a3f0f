"""Commands that measure pairs: evaluate pairs (everything) and evaluate alignment."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from services.client.cli import options, specification
from services.client.cli.direct import draw_pairs
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars, say

evaluate = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Measure pairs.")


@evaluate.callback()
def measures() -> None:
    """Measure pairs."""


MaxPairs = Annotated[int, typer.Option(min=2, help="Score at most so many pairs, a seeded choice.")]
DrawnPairs = Annotated[int, typer.Option("--count", "-n", min=2, help="Pairs to draw from a model folder.")]
PairsOrModel = Annotated[
    Path, typer.Argument(exists=True, help="Folder or zip of pairs, or a model folder (pairs are drawn first).")
]


@evaluate.command("pairs")
def whole(
    pairs: PairsOrModel,
    reference: Annotated[Path, typer.Option(exists=True, help="Held-out real pairs: what the pairs should be like.")],
    train: Annotated[
        Path | None, typer.Option(exists=True, help="The training pairs: are any of them repeated?")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help='Base whose VAE the reference goes through for alignment; "" for none.')
    ] = "tiny",
    extractor: Annotated[str, typer.Option(help="Features for fidelity and diversity: filters | vit")] = "filters",
    extractor_folder: Annotated[
        Path | None, typer.Option(help="Folder of the vision transformer (DINOv2, RETFound) for --extractor vit.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for report.md, report.json and the pictures.")
    ] = None,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
    max_pairs: MaxPairs = 256,
    count: DrawnPairs = 64,
    noise: options.Noise = None,
    scheduler: options.Scheduler = None,
    steps: options.SampleSteps = None,
    resolution: options.Resolution = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Everything: alignment, fidelity (KID, FID), diversity (density, coverage, Vendi), memorisation, as a report."""
    from cffa_core.recipes.evaluate_pairs import evaluate_pairs

    with ExitStack() as stack:
        settings = {"noise": noise, "scheduler": scheduler, "steps": steps, "resolution": resolution}
        source = _source(stack, pairs, out, count=count, seed=seed, device=device, **settings)
        report = evaluate_pairs(
            source,
            reference=reference,
            train=train,
            base=base or None,
            extractor=extractor,
            extractor_folder=extractor_folder,
            out=out,
            on_progress=stack.enter_context(progress_bars()),
            eye_pattern=eye_pattern,
            patient_pattern=patient_pattern,
            max_pairs=max_pairs,
            seed=seed or 0,
            device=options.device(device),
            models_dir=options.settings().models_dir,
        )
    if as_json:
        print_json(report.to_dict())
        return
    for rows in (report.alignment.table(), report.table()):
        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])
    for line in report.refusals():
        say(f"refused: {line}")
    if out is not None:
        say(f"report: {out / 'report.md'}")


@evaluate.command("alignment")
def alignment(
    pairs: PairsOrModel,
    reference: Annotated[
        Path | None, typer.Option(exists=True, help="Real pairs, best held-out ones: the ceiling of the scores.")
    ] = None,
    base: options.VaeBase = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder for alignment.json and .png.")] = None,
    eye_pattern: options.EyePattern = None,
    patient_pattern: options.PatientPattern = None,
    max_pairs: MaxPairs = 256,
    count: DrawnPairs = 32,
    noise: options.Noise = None,
    scheduler: options.Scheduler = None,
    steps: options.SampleSteps = None,
    resolution: options.Resolution = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """How well CF and FA register: scores, their floor (shuffled pairs), their ceiling (real pairs), and A between."""
    from cffa_core.recipes.evaluate import evaluate_alignment

    with ExitStack() as stack:
        settings = {"noise": noise, "scheduler": scheduler, "steps": steps, "resolution": resolution}
        source = _source(stack, pairs, out, count=count, seed=seed, device=device, **settings)
        report = evaluate_alignment(
            source,
            reference=reference,
            base=base,
            out=out,
            on_progress=stack.enter_context(progress_bars()),
            eye_pattern=eye_pattern,
            patient_pattern=patient_pattern,
            max_pairs=max_pairs,
            seed=seed or 0,
            device=options.device(device),
            models_dir=options.settings().models_dir,
        )
    if as_json:
        print_json(report.to_dict())
    else:
        rows = report.table()
        print_table(tuple(rows[0]), [tuple(row.values()) for row in rows])


def _source(
    stack: ExitStack, pairs: Path, out: Path | None, *, count: int, seed: int | None, device: str, **settings: Any
) -> Path:
    """The pairs as they are, or ``count`` pairs drawn with a model folder into ``out/pairs`` or a temporary folder."""
    if not (pairs / "model.json").is_file():
        return pairs
    settings["resolution"] = settings["resolution"] or _resolution_of(pairs)
    wanted = specification.generate_settings(None, None, count=count, seed=seed, **settings)
    source = out / "pairs" if out else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cffa-")))
    say(f"drawing {count} pairs with {pairs}")
    draw_pairs(pairs, wanted, source, base=None, device=device)
    return source


def _resolution_of(model: Path) -> int:
    """The resolution a model was trained at."""
    from cffa_core.methods.method import read_card

    return int(read_card(model)["settings"]["resolution"])


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(evaluate, name="evaluate", rich_help_panel="On this machine, without a service")
