"""``cffa attention``: look into the attention of a pair's sampling, on this machine and without a service.

``cffa submit attention`` posts the same as a job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from services.client.cli import options, specification
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars, say

Index = Annotated[int | None, typer.Option(help="Which pair of the seed is drawn and looked into.")]
Words = Annotated[
    list[str] | None,
    typer.Option("--token", help="A word of the prompts that is shown; may be repeated. Default: every one."),
]
MapKinds = Annotated[
    list[str] | None,
    typer.Option("--kind", help="cross (where words look) | self (where points look); may be repeated."),
]
Points = Annotated[
    list[str] | None,
    typer.Option("--point", metavar="X,Y", help="With kind self: a point as fractions, e.g. 0.5,0.4."),
]
MapResolution = Annotated[int | None, typer.Option(help="Side to which maps are brought and averaged.")]


def attention(
    model: options.ModelFolder,
    out: Annotated[
        Path, typer.Option("--out", "-o", file_okay=False, help="Folder for the sheet, the maps and the report.")
    ],
    index: Index = None,
    token: Words = None,
    kind: MapKinds = None,
    point: Points = None,
    place: Annotated[
        list[str] | None, typer.Option(help="down | mid | up; may be repeated. Default: down, up.")
    ] = None,
    map_resolution: MapResolution = None,
    keep_step: Annotated[
        list[int] | None,
        typer.Option(help="A step of the sampler, from 0, that is kept; may be repeated. Default: all."),
    ] = None,
    each_step: Annotated[bool, typer.Option("--each-step", help="Show every kept step by itself too.")] = False,
    each_layer: Annotated[bool, typer.Option("--each-layer", help="Show every layer by itself too.")] = False,
    cf_prompt: Annotated[str | None, typer.Option(help="Prompt of the CF; default: that of the training.")] = None,
    fa_prompt: Annotated[str | None, typer.Option(help="Prompt of the FA; default: that of the training.")] = None,
    resolution: options.Resolution = None,
    scheduler: options.Scheduler = None,
    steps: options.SampleSteps = None,
    guidance: options.Guidance = None,
    noise: options.Noise = None,
    structures: Annotated[
        str | None, typer.Option(metavar="procedural", help="For a model of method controlnet: what it draws on.")
    ] = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    base: options.BaseOfModel = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Show where words and points look while a model draws a pair: a sheet, overlays, tensors and a report."""
    from cffa_core.jobs.spec import AttentionSettings

    fields: dict[str, object] = {
        "index": index,
        "tokens": token or None,
        "kinds": kind or None,
        "points": [point_of(text) for text in point] if point else None,
        "places": place or None,
        "map_resolution": map_resolution,
        "steps": sorted(keep_step) if keep_step else None,
        "each_step": each_step or None,
        "each_layer": each_layer or None,
        "sampler.cf_prompt": cf_prompt,
        "sampler.fa_prompt": fa_prompt,
        "sampler.scheduler": scheduler,
        "sampler.steps": steps,
        "sampler.guidance_scale": guidance,
        "sampler.initial_noise": noise,
        "resolution": resolution,
        "structures": structures,
        "seed": seed,
    }
    settings = specification.settings_of(AttentionSettings, spec, assignments, **fields)
    from cffa_core.methods.method import read_card
    from cffa_core.recipes.attention import capture_attention

    places = options.settings()
    where = base or str(read_card(model)["base"]["name"])
    with progress_bars() as bars:
        report = capture_attention(
            settings,
            model,
            where,
            out,
            lambda stage, done, total: bars(f"attention: {stage}", done, total),
            device=options.device(device),
            models_dir=places.models_dir,
        )
    if as_json:
        print_json(report)
    else:
        _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    if report["words"]:
        rows = [
            (word["modality"].upper(), word["word"], f"{word['mean']:.4f}", f"{word['peak']:.4f}", _at(word["peak_at"]))
            for word in report["words"]
        ]
        print_table(("image", "word", "mean", "peak", "peak at"), rows)
    if report["looks"]:
        rows = [
            (
                look["from"].upper(),
                _at(look["point"]),
                look["modality"].upper(),
                f"{look['share']:.3f}",
                _at(look["peak_at"]),
            )
            for look in report["looks"]
        ]
        print_table(("from", "point", "looks into", "share", "most at"), rows)
    say(f"sheet: {out / 'sheet.png'}")


def _at(point: list[float]) -> str:
    return f"{point[0]:.2f}, {point[1]:.2f}"


def point_of(point: str) -> list[float]:
    """``0.5,0.4`` as two numbers."""
    try:
        x, y = (float(part) for part in point.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"{point!r} is no point X,Y", param_hint="--point") from error
    return [x, y]


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command(rich_help_panel="On this machine, without a service")(attention)
