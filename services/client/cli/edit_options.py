"""Options that ``cffa edit`` and ``cffa submit edit`` share, and the edits they say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cffa_core.errors import InvalidSpec
from services.client.cli import specification

Add = Annotated[list[str] | None, typer.Option(help="What is added, in a word or two; may be repeated.")]
Remove = Annotated[list[str] | None, typer.Option(help="What is removed; may be repeated.")]
Mask = Annotated[str | None, typer.Option(help="The mask of both images: cf | fa | intersection | union.")]
Strength = Annotated[float | None, typer.Option(help="Weight of each edit's guidance.")]
Threshold = Annotated[float | None, typer.Option(help="Quantile above which a place is in an edit's mask.")]
Warmup = Annotated[int | None, typer.Option(help="Steps before each edit begins.")]
Skip = Annotated[float | None, typer.Option(help="Part of the steps, the noisiest ones, that is left out.")]


def edit_terms(
    spec: Path | None, add: list[str] | None, remove: list[str] | None, changed: dict[str, float | int | None]
) -> list[dict[str, Any]]:
    """The edits of the options, or else those of the file of ``--spec``, each with what ``changed`` gives."""
    found: list[dict[str, Any]] = [{"text": text, "direction": "add"} for text in add or ()]
    found += [{"text": text, "direction": "remove"} for text in remove or ()]
    found = found or list(specification.field(spec, "edits") or ())
    if not found:
        raise InvalidSpec("say what changes: --add TEXT or --remove TEXT (or edits in the file of --spec)")
    return [term | {key: value for key, value in changed.items() if value is not None} for term in found]
