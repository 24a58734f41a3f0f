"""What commands print, and how: tables or JSON on standard output, everything else on standard error.

Typed errors become one red line, their problems one line each, and exit code 1; no command handles them itself.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from cffa_core.errors import CffaError

if TYPE_CHECKING:
    from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output and nothing else there.")]
PIPED_WIDTH = 240
OnProgress = Callable[[str, int, int], None]


def out() -> Console:
    """Standard output, for results; piped tables are not folded to a terminal's width."""
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)


@cache
def err() -> Console:
    """Standard error, for everything said along the way; one console, so that lines come out above moving bars."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Say one line along the way (plain text, no markup)."""
    err().print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """Print a table on standard output; columns of numbers are set to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for position, column in enumerate(columns):
        numbers = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        table.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    out().print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def print_error(error: CffaError) -> None:
    """One red line, then the problems, one line each."""
    console = err()
    console.print(f"error: {error.message}", style="bold red", markup=False, soft_wrap=True)
    for problem in error.problems:
        console.print(f"  {problem.pointer}: {problem.message} [{problem.code}]", markup=False, soft_wrap=True)
    request_id = getattr(error, "request_id", None)
    if request_id:
        console.print(f"  request {request_id}", style="dim", markup=False)


class TypedErrors(TyperGroup):
    """Group of commands in which a typed error ends with exit code 1 and no traceback."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except CffaError as error:
            print_error(error)
            raise typer.Exit(1) from error


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """Yield a callback ``(stage, current, total)`` that draws bars on standard error.

    Stages named alike up to a colon (``training: encoding``, ``training: validation``) share one bar; the newest bar
    is the one shown. Without a terminal each stage says where it is at every quarter.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = err()
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def on_progress(stage: str, current: int, total: int) -> None:
            bar = stage.partition(":")[0]
            if bar not in tasks:
                for done in tasks.values():
                    bars.update(done, visible=False)
                tasks[bar] = bars.add_task(stage, total=total)
            bars.update(tasks[bar], description=stage, completed=current, total=total)

        yield on_progress


def _lines(console: Console) -> OnProgress:
    said: dict[str, int] = {}

    def on_progress(stage: str, current: int, total: int) -> None:
        quarter = 4 * current // total if total else 0
        if said.get(stage) != quarter:
            said[stage] = quarter
            console.print(f"{stage}: {current} of {total}", markup=False)

    return on_progress
