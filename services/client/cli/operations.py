"""Commands for whoever runs the service: backup, restore, verify-store.

They use the record and the object store of this machine's settings (``CFFA_*``) directly, and need no running service.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.client.cli import options
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars, say

BRING_SECRETS = (
    "no secrets are in a backup: before the service starts, bring those of the old one along (*.key of its CFFA_HOME, "
    "or its CFFA_SECRETS_DIR), or none of its API keys is good"
)


def backup(
    to: Annotated[Path, typer.Option("--to", file_okay=False, help="New folder for the backup.")],
    as_json: AsJson = False,
) -> None:
    """Write the record, all objects it points to and all bases of the store into a folder; the service may go on."""
    from cffa_core.operations.backup import back_up
    from cffa_core.storage.open import open_store

    settings = options.settings()
    with progress_bars() as bars:
        made = back_up(
            settings.record_url,
            open_store(settings),
            to,
            on_object=lambda done, total: bars("copying objects", done, total),
        )
    report = {"folder": str(to), "objects": made.objects, "bytes": made.bytes, "schema": made.schema}
    print_json(report) if as_json else print_table(tuple(report), [tuple(report.values())])


def restore(
    source: Annotated[
        Path, typer.Option("--from", exists=True, file_okay=False, help="Folder that `cffa backup` wrote.")
    ],
    as_json: AsJson = False,
) -> None:
    """Fill an empty record and object store from a backup; unfinished jobs are queued again."""
    from cffa_core.operations.restore import restore as restore_backup
    from cffa_core.storage.open import open_store

    settings = options.settings()
    with progress_bars() as bars:
        made = restore_backup(
            source,
            settings.record_url,
            open_store(settings),
            on_object=lambda done, total: bars("storing objects", done, total),
        )
    report = {"objects": made.objects, "bytes": made.bytes, "of": made.created_at}
    print_json(report) if as_json else print_table(tuple(report), [tuple(report.values())])
    say(BRING_SECRETS)


def verify_store(
    deep: Annotated[bool, typer.Option("--deep", help="Read every object and check its SHA-256.")] = False,
    as_json: AsJson = False,
) -> None:
    """Look for every object that the record points to; exit code 1 if one is missing or not what it should be."""
    from cffa_core.errors import CorruptArtifact
    from cffa_core.operations.inventory import verify_store as verify
    from cffa_core.storage.open import open_store

    settings = options.settings()
    with progress_bars() as bars:
        found = verify(
            settings.record_url,
            open_store(settings),
            deep=deep,
            on_object=lambda done, total: bars("looking at objects", done, total),
        )
    report = {"objects": found.objects, "bytes": found.bytes, "wrong": len(found.problems), "deep": deep}
    print_json(report) if as_json else print_table(tuple(report), [tuple(report.values())])
    if found.problems:
        raise CorruptArtifact(
            f"{len(found.problems)} of {found.objects} objects are not what the record says", problems=found.problems
        )


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    for name, command in (("backup", backup), ("restore", restore), ("verify-store", verify_store)):
        app.command(name, rich_help_panel="Running the service")(command)
