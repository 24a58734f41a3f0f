"""Commands about base models: base build, base teach, base info."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from cffa_core.errors import Conflict, ModelUnavailable
from services.client.cli import options
from services.client.cli.terminal import AsJson, TypedErrors, print_json, print_table, progress_bars, say

base = typer.Typer(cls=TypedErrors, no_args_is_help=True, help="Base models.")
WEIGHTS = ("unet", "vae", "text_encoder")
Out = Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder of the finished base.")]
Work = Annotated[
    Path | None, typer.Option(file_okay=False, help="Caches and checkpoints (several GB); default: OUT-work.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint below WORK.")]


@base.command("info")
def base_info(
    name: Annotated[str, typer.Argument(help="`tiny`, a folder, or a hub id that was downloaded.")] = "tiny",
    as_json: AsJson = False,
) -> None:
    """Show a base's parts, parameters, size, digest and model card."""
    from cffa_core.models.base_folder import base_digest
    from cffa_core.models.fetch import find_base

    folder, shown = find_base(name, models_dir=options.settings().models_dir)
    parts = [_part(folder / part) for part in WEIGHTS]
    card = folder / "README.md"
    report = {
        "name": shown,
        "folder": str(folder),
        "digest": base_digest(folder),
        "parts": parts,
        "card": card.read_text(encoding="utf-8") if card.is_file() else None,
    }
    if as_json:
        print_json(report)
        return
    rows = [(part["part"], part["parameters"], part["bytes"], part["dtypes"]) for part in parts]
    rows.append(("total", sum(p["parameters"] for p in parts), sum(p["bytes"] for p in parts), ""))
    print_table(("part", "parameters", "bytes", "type"), rows, title=f"{shown} in {folder}")
    say(f"digest {report['digest']}")
    if report["card"]:
        say("")
        say(str(report["card"]))


@base.command("build")
def base_build(
    out: Out,
    work: Work = None,
    resume: Resume = False,
    seed: options.SetSeed = 0,
    words: Annotated[bool, typer.Option(help="Teach it the words of findings, too (40 minutes of it).")] = True,
) -> None:
    """Train the `tiny` base anew from procedural pairs alone (about three hours on two cores)."""
    from cffa_core.recipes.pretrain import build_tiny
    from cffa_core.recipes.pretrain_config import PretrainConfig

    place = _work(out, work, resume)
    with progress_bars() as bars:
        build_tiny(
            out,
            seed=seed,
            work=place,
            config=PretrainConfig(teach_words=words),
            resume=resume,
            on_progress=lambda stage, done, total, loss: bars(f"build: {stage}", done, total),
        )
    typer.echo(str(out))


@base.command("teach")
def base_teach(
    name: Annotated[str, typer.Argument(help="`tiny`, or the folder of a base that `cffa base build` made.")],
    out: Out,
    work: Work = None,
    resume: Resume = False,
    seed: options.SetSeed = 0,
) -> None:
    """Teach a base the words of findings, and nothing else (40 minutes on two cores, and the phantoms)."""
    from cffa_core.recipes.teach import teach_words

    place = _work(out, work, resume)
    with progress_bars() as bars:
        facts = teach_words(
            name,
            out,
            seed=seed,
            work=place,
            resume=resume,
            on_progress=lambda stage, done, total, loss: bars(f"teach: {stage}", done, total),
        )
    rows = [(finding, f"{ratio:.2f}") for finding, ratio in facts["words"].items()]
    print_table(("finding", "error without its word / with it"), rows, title=str(out))


def _work(out: Path, work: Path | None, resume: bool) -> Path:
    """The folder of caches and checkpoints; raises ``Conflict`` where another run's are that was not asked for."""
    place = work or out.with_name(f"{out.name}-work")
    if place.exists() and any(place.iterdir()) and not resume:
        raise Conflict(f"{place} holds an earlier run: go on with --resume, or name another --work")
    return place


def _part(folder: Path) -> dict[str, Any]:
    """Parameters and size of one part, from the headers of its safetensors files: no weight is read."""
    parameters, size, kinds = 0, 0, set()
    for path in sorted(folder.glob("*.safetensors")):
        size += path.stat().st_size
        for tensor in _header(path).values():
            parameters += math.prod(tensor["shape"])
            kinds.add(str(tensor["dtype"]))
    return {"part": folder.name, "parameters": parameters, "bytes": size, "dtypes": ", ".join(sorted(kinds))}


def _header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: 8 bytes of length (little endian), then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length < 100_000_000 else None
        except ValueError:
            header = None
    if not isinstance(header, dict):
        raise ModelUnavailable(f"{path} is not a safetensors file")
    return {name: value for name, value in header.items() if name != "__metadata__"}


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    app.add_typer(base, name="base", rich_help_panel="On this machine, without a service")
