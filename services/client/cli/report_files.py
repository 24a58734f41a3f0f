"""Reports of jobs on the command line: their download, and what is printed of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from services.client.cli.terminal import OnProgress, print_json, print_table

if TYPE_CHECKING:
    from services.client.client import CffaClient
    from services.client.resources import Report


def download_report(client: CffaClient, job_id: str, out: Path, on_progress: OnProgress) -> tuple[Path, Report]:
    """Download a report; returns its folder (``JOB-report`` inside ``out``, if there is such a folder) and it."""
    folder = out / f"{job_id}-report" if out.is_dir() else out
    report = client.download_report(
        job_id, folder, on_bytes=lambda done, total: on_progress("downloading", done, total)
    )
    return folder, report


def print_report_files(folder: Path, report: Report, *, as_json: bool) -> None:
    """One line per file, or all of it as JSON."""
    listed = [(str(folder / file.name), file.bytes, file.sha256) for file in report.files]
    if as_json:
        files = [dict(zip(("path", "bytes", "sha256"), row, strict=True)) for row in listed]
        print_json({"path": str(folder), "files": files, "report": report.report})
    else:
        print_table(("file", "bytes", "sha256"), listed)
