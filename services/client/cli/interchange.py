"""Commands that pass models and data sets on: model export, model import, dataset export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from cffa_core.errors import InvalidSpec, Problem
from services.client.cli import options
from services.client.cli.direct import Pairs, dataset
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars, say

model = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Pass trained models on, and take others' LoRAs in.")
LoraPath = Annotated[
    Path | None, typer.Option(help="LoRA (.safetensors) by diffusers, peft or kohya, or the folder that holds it.")
]


@model.command("export")
def model_export(
    folder: options.ModelOrRun,
    lora: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write OUT/cf and OUT/fa for load_lora_weights of diffusers.")
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(metavar="OUT", help="Write OUT/cf and OUT/fa as whole bases with the LoRA fused in.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Only this one: cf or fa; `pair` where one LoRA serves both.")
    ] = None,
    base: options.BaseOfModel = None,
    as_json: AsJson = False,
) -> None:
    """Export a model as standard LoRA files, or as Stable Diffusion folders with the LoRA fused in."""
    from cffa_core.recipes.interchange import export_lora, export_merged

    if lora is not None and merged is None:
        report = export_lora(folder, lora, only=modality)
        rows = [(name, lora / entry["file"]) for name, entry in report["files"].items()]
    elif merged is not None and lora is None:
        say("loading the base and fusing")
        report = export_merged(folder, merged, base=base, only=modality, models_dir=options.settings().models_dir)
        rows = [(name, merged / entry) for name, entry in report["folders"].items()]
    else:
        problem = Problem("/lora", "missing", "name the output with --lora OUT or with --merged OUT")
        raise InvalidSpec("say what to export: --lora OUT or --merged OUT, one of the two", problems=(problem,))
    if as_json:
        print_json(report)
    else:
        print_table(("LoRA", "written"), rows)


@model.command("import")
def model_import(
    base: Annotated[str, typer.Option(help="Base that the LoRAs were trained on: `tiny`, a folder, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Model folder to make.")],
    cf: LoraPath = None,
    fa: LoraPath = None,
    card: Annotated[
        Path | None, typer.Option(dir_okay=False, help="card.json of an export: prompts, resolution, noise rotations.")
    ] = None,
    resolution: options.Resolution = None,
    cf_prompt: Annotated[str | None, typer.Option(help="Prompt that the CF LoRA was trained with.")] = None,
    fa_prompt: Annotated[str | None, typer.Option(help="Prompt that the FA LoRA was trained with.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a model folder of two LoRAs that other programs trained; `cffa generate` takes it as its own."""
    from cffa_core.recipes.interchange import import_lora

    made = import_lora(
        cf=cf,
        fa=fa,
        base=base,
        out=out,
        card=card,
        resolution=resolution,
        cf_prompt=cf_prompt,
        fa_prompt=fa_prompt,
        models_dir=options.settings().models_dir,
    )
    if as_json:
        print_json(made)
    else:
        settings = made["settings"]
        row = (out, made["base"]["name"], settings["lora"]["rank"], settings["lora"]["alpha"], settings["resolution"])
        print_table(("model", "base", "rank", "alpha", "resolution"), [row])


@dataset.command("export")
def dataset_export(
    path: Pairs,
    kind: Annotated[
        Literal["folder", "zip", "webdataset", "imagefolder", "dicom"],
        typer.Option("--format", help="Form of the export; dicom is refused here: `cffa export` writes it."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder (or zip file) to make.")],
    licence: Annotated[
        str | None, typer.Option(help="Licence to state, e.g. cc-by-4.0 or its address; without it none is stated.")
    ] = None,
    origin: Annotated[
        Literal["real", "generated", "procedural"] | None,
        typer.Option(help="Where the pairs come from, if the source does not record it."),
    ] = None,
    title: Annotated[str, typer.Option(help="Name of the data set.")] = "CF-FA pairs",
    shard_pairs: Annotated[int, typer.Option(min=1, help="Pairs per shard (webdataset).")] = 256,
    eye_pattern: options.EyePattern = None,
    as_json: AsJson = False,
) -> None:
    """Export pairs (any layout, or a downloaded archive) with a data card and Croissant metadata."""
    from cffa_core.data.export import export_pairs, no_such_form

    if kind == "dicom":
        raise no_such_form(kind)
    with progress_bars() as bars:
        report = export_pairs(
            path,
            out,
            kind,
            title=title,
            licence=licence,
            origin=origin,
            shard_pairs=shard_pairs,
            eye_pattern=eye_pattern,
            on_progress=bars,
        )
    for name in report["masks_left_out"]:
        say(f"warning: {name}: belongs to no pair; left out")
    if as_json:
        print_json(report)
    else:
        found = report["origin"]["kind"]
        row = (out, kind, report["pairs"], report["eyes"], found, licence or "not stated")
        print_table(("written", "format", "pairs", "eyes", "origin", "licence"), [row])


def register(app: typer.Typer) -> None:
    """Add these commands to the command line (`dataset export` stands with `dataset check`)."""
    app.add_typer(model, name="model", rich_help_panel="On this machine, without a service")
