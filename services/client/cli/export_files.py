"""What commands say about the files of an export that was downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from services.client.cli.terminal import OnProgress, print_json, print_table

if TYPE_CHECKING:
    from services.client.resources import Archives


def byte_bars(bars: OnProgress) -> Callable[[int, int], None]:
    """A counter of bytes that draws on ``bars``."""
    return lambda done, total: bars("downloading", done, total)


def print_export(found: Archives, folder: Path, *, as_json: bool) -> None:
    """The archives of an export and where they are now."""
    if as_json:
        listed = found.model_dump(mode="json", include={"parts", "manifest"})
        files = [{key: value for key, value in file.items() if key != "url"} for file in listed["parts"]]
        print_json({"out": str(folder), "files": files, "manifest": listed["manifest"]["sha256"]})
        return
    rows = [(folder / file.filename, file.pairs, file.bytes, file.sha256) for file in found.parts]
    print_table(("archive", "pairs", "bytes", "sha256"), rows)
