"""``cffa edit``: edit the pairs of a folder or zip by text, without a service. `cffa submit edit` posts a job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from services.client.cli import options, specification
from services.client.cli.edit_options import Add, Mask, Remove, Skip, Strength, Threshold, Warmup, edit_terms
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars

if TYPE_CHECKING:
    from cffa_core.jobs.edit_spec import EditSettings


def edit(
    source: Annotated[Path, typer.Argument(exists=True, help="Folder or zip of pairs, in any of the three layouts.")],
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder for cf/, fa/, mask/ and sheet/.")],
    add: Add = None,
    remove: Remove = None,
    model: Annotated[
        Path | None, typer.Option(exists=True, file_okay=False, help="Model folder; default: the base alone.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base: `tiny`, a hub id, or a folder. Default: the model's, else tiny.")
    ] = None,
    name: Annotated[list[str] | None, typer.Option(help="This pair alone; may be repeated. Default: all.")] = None,
    where: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of NAME.png, white where the pair may change."),
    ] = None,
    mask: Mask = None,
    strength: Strength = None,
    threshold: Threshold = None,
    warmup: Warmup = None,
    resolution: options.Resolution = None,
    steps: options.SampleSteps = None,
    skip: Skip = None,
    seed: options.Seed = None,
    spec: options.SpecFile = None,
    assignments: options.Assignments = None,
    device: options.Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Add to pairs, or remove from them, what words say: one mask for both images, all else stays as it is."""
    from cffa_core.jobs.edit_spec import EditSettings

    fields: dict[str, object] = {
        "edits": edit_terms(spec, add, remove, {"strength": strength, "threshold": threshold, "warmup": warmup}),
        "mask": mask,
        "resolution": resolution,
        "steps": steps,
        "skip": skip,
        "seed": seed,
        # The pairs are counted when they are read.
        "count": 1,
    }
    settings = specification.settings_of(EditSettings, spec, assignments, **fields)
    entries = edit_folder(source, settings, out, model=model, base=base, names=name, where=where, device=device)
    if as_json:
        print_json({"out": str(out), "pairs": entries})
    else:
        rows = [
            (entry["source"], f"{entry['mask_share']:.0%}", _alignment(entry), entry["cf"]["name"]) for entry in entries
        ]
        print_table(("pair", "mask", "ridge correlation before, after", "CF"), rows)


def edit_folder(
    source: Path,
    settings: EditSettings,
    out: Path,
    *,
    model: Path | None,
    base: str | None,
    names: list[str] | None,
    where: Path | None,
    device: str,
) -> list[dict[str, Any]]:
    """Edit the pairs of ``source`` one at a time into ``out``; returns their entries, also in ``out/pairs.json``."""
    from cffa_core.jobs.context import FolderContext
    from cffa_core.methods.method import read_card
    from cffa_core.recipes.edit import edit_part, load_editor, read_areas, read_sources

    places = options.settings()
    found = base or ("tiny" if model is None else str(read_card(model)["base"]["name"]))
    areas = None if where is None else read_areas(where)
    staging = out / ".part"
    entries: list[dict[str, Any]] = []
    with progress_bars() as bars:
        bars("loading the model", 0, 1)
        editor = load_editor(settings, model, found, options.device(device), models_dir=places.models_dir)
        bars("loading the model", 1, 1)
        for pair in read_sources(source, settings.resolution, names=names, areas=areas):
            label = f"edit: {pair.name}"
            context = FolderContext(out, lambda stage, done, total, label=label: bars(label, done, total))  # type: ignore[misc]
            shutil.rmtree(staging, ignore_errors=True)
            edit_part(editor, settings, [pair], staging, context)
            for path in sorted(staging.rglob("*.png")):
                target = out / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
            entries += json.loads((staging / "part.json").read_text(encoding="utf-8"))["pairs"]
    shutil.rmtree(staging, ignore_errors=True)
    entries.sort(key=lambda entry: int(entry["index"]))
    described = {"edit": settings.model_dump(mode="json", exclude={"count", "part_size"}), "pairs": entries}
    (out / "pairs.json").write_text(json.dumps(described, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return entries


def _alignment(entry: dict[str, Any]) -> str:
    """Ridge correlation of CF and FA before and after; a dash where too little is seen in common."""
    scores = [entry["alignment_before"], entry["alignment"]]
    return ", ".join("-" if score is None else f"{score['ridge_correlation']:.3f}" for score in scores)


def register(app: typer.Typer) -> None:
    """Add this command to the command line."""
    app.command(rich_help_panel="On this machine, without a service")(edit)
