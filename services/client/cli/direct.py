"""Commands that work here and now, without a service: phantom, train, generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.client.cli import options, specification
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from cffa_core.jobs.spec import GenerateSettings

dataset = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Data sets of pairs.")
Pairs = Annotated[Path, typer.Argument(metavar="PATH", help="Folder or zip of pairs, in any of the three layouts.")]
Sheet = Annotated[Path | None, typer.Option(dir_okay=False, help="Write a contact sheet (PNG) here.")]


def phantom(
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of pairs.")] = 4,
    sheet: Sheet = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Write a data-set folder here.")] = None,
    resolution: options.Resolution = 512,
    seed: options.Seed = 0,
) -> None:
    """Draw procedural pairs: as a contact sheet, a data-set folder, or both."""
    from cffa_core.data import phantom as phantoms
    from cffa_core.rng import derive_seed

    if sheet is None and out is None:
        sheet = Path("phantoms.png")
    first, size = seed or 0, resolution or 512
    with progress_bars() as bars:
        if out is not None:
            phantoms.write_phantoms(out, n, first, size, lambda done, total: bars("drawing pairs", done, total))
        if sheet is not None:
            drawn = []
            for index in range(n):
                drawn.append(phantoms.make_phantom(derive_seed(first, "phantom", index), size).renamed(f"p{index:05d}"))
                bars("drawing the sheet", index + 1, n)
            sheet.parent.mkdir(parents=True, exist_ok=True)
            phantoms.contact_sheet(drawn).save(sheet)
    for written in (out, sheet):
        if written is not None:
            typer.echo(str(written))


def train(
    data: Pairs,
    out: options.RunFolder,
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
    device: options.Device = "auto",
    lpips_weights: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Weights for loss.lpips_lambda; default CFFA_LPIPS_WEIGHTS.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train on a folder or zip of pairs, without a service; leaves logs, previews and OUT/best_checkpoint."""
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
    from cffa_core.jobs.context import FolderContext
    from cffa_core.recipes.train import run_training

    places = options.settings()
    with progress_bars() as bars:
        context = FolderContext(out, lambda stage, done, total: bars(f"train: {stage}", done, total))
        model = run_training(
            settings,
            data,
            settings.base,
            out,
            context,
            device=options.device(device),
            models_dir=places.models_dir,
            lpips_weights=lpips_weights or places.lpips_weights,
        )
    if as_json:
        print_json(model)
    else:
        found = model.get("validation") or {}
        print_table(("model", "step", "validation"), [(out / "best_checkpoint", model["step"], found.get("loss"))])


def generate(
    model: options.ModelFolder,
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder for cf/ and fa/.")],
    count: options.Count = 8,
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
    structures: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|procedural",
            help="For a model of method controlnet: pairs whose vessels are drawn, or procedural eyes.",
        ),
    ] = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    base: options.BaseOfModel = None,
    sheet: Sheet = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate pairs with a trained model, without a service."""
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
        structures=specification.structures(structures),
        seed=seed,
    )
    dataset = Path(structures) if structures and settings.structures == "dataset" else None
    pairs = draw_pairs(model, settings, out, base=base, device=device, structures=dataset)
    missing = len(settings.indices) - len(pairs)
    if sheet is not None:
        write_sheet(out, pairs, sheet)
    if as_json:
        print_json({"out": str(out), "pairs": pairs})
    else:
        rows = [
            (pair["index"], pair["seed"], _score(pair, "alignment"), _score(pair, "novelty"), pair["cf"]["name"])
            for pair in pairs
        ]
        print_table(("pair", "seed", "ridge correlation", "similarity to training", "CF"), rows)
        if missing:
            say(f"{missing} of {len(settings.indices)} slots stayed empty: no try passed the gate; see {out}/rejects")


def _score(pair: dict[str, Any], kind: str) -> object:
    """The score of a pair that a gate looks at; a dash where there is none."""
    name = {"alignment": "ridge_correlation", "novelty": "similarity"}[kind]
    return "-" if pair[kind] is None else pair[kind][name]


def draw_pairs(
    model: Path,
    settings: GenerateSettings,
    out: Path,
    *,
    base: str | None,
    device: str,
    structures: Path | None = None,
) -> list[dict[str, Any]]:
    """Draw all pairs of ``settings`` into ``out/cf`` and ``out/fa``; returns their entries in index order.

    ``out/manifest.json`` says of them what the manifest of an archive would; pairs that a gate refused are below
    ``out/rejects``. ``structures`` are the pairs that ``settings.structures = "dataset"`` stands for.
    """
    from cffa_core.jobs.context import FolderContext
    from cffa_core.methods.method import read_card
    from cffa_core.recipes.archive import FORMAT, MODALITIES, REJECTS
    from cffa_core.recipes.generate import generate_part, load_sampler
    from cffa_core.recipes.novelty import training_pairs_beside
    from cffa_core.recipes.provenance import provenance
    from cffa_core.recipes.structures import structures_for
    from cffa_core.rng import numerics_key

    places = options.settings()
    where = base or str(read_card(model)["base"]["name"])
    staging = out / ".part"
    pairs: list[dict[str, Any]] = []
    empty: list[dict[str, Any]] = []
    asked = options.device(device)
    with progress_bars() as bars:
        bars("loading the model", 0, 1)
        sampler = load_sampler(settings, model, where, asked, models_dir=places.models_dir)
        training = training_pairs_beside(model)
        drawn_on = structures_for(settings, sampler.model, structures)
        bars("loading the model", 1, 1)
        for part in range(settings.parts):
            label = f"generate: part {part + 1} of {settings.parts}"
            context = FolderContext(out, lambda stage, done, total, label=label: bars(label, done, total))  # type: ignore[misc]
            shutil.rmtree(staging, ignore_errors=True)
            report = generate_part(sampler, settings, part, staging, context, drawn_on, training)
            refused = [path.relative_to(staging) for path in sorted((staging / REJECTS).rglob("*.png"))]
            made = [Path(pair[modality]["name"]) for pair in report["pairs"] for modality in MODALITIES]
            for name in [*made, *refused]:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (staging / name).replace(out / name)
            pairs += report["pairs"]
            empty += report["exhausted"]
    shutil.rmtree(staging, ignore_errors=True)
    header = provenance(
        settings,
        model_digest=sampler.model_digest,
        dataset_digest=read_card(model)["dataset_digest"],
        numerics_key=numerics_key(device=asked, dtype=settings.precision, batch_size=settings.batch_size),
    )
    manifest = {"format": FORMAT, **header, "exhausted": empty, "pairs": pairs}
    out.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return pairs


def write_sheet(folder: Path, pairs: list[dict[str, Any]], sheet: Path, title: str = "Generated pairs") -> None:
    """Write a contact sheet of the generated pairs whose entries are ``pairs`` and whose files are in ``folder``."""
    import numpy as np
    from PIL import Image

    from cffa_core.data.sheet import SheetRow, contact_sheet

    rows = [
        SheetRow(
            np.asarray(Image.open(folder / pair["cf"]["name"]).convert("RGB")),
            np.asarray(Image.open(folder / pair["fa"]["name"]).convert("L")),
            (f"pair {pair['index']}", f"seed {pair['seed']}"),
        )
        for pair in pairs
    ]
    contact_sheet(rows, sheet, title=title)


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    panel = "On this machine, without a service"
    app.add_typer(dataset, name="dataset", rich_help_panel=panel)
    app.command(rich_help_panel=panel)(phantom)
    app.command(rich_help_panel=panel)(train)
    app.command(rich_help_panel=panel)(generate)
