"""The ``cffa`` command line: one group of commands per module, everything heavy imported when a command runs.

This is the only part of the services that may start other services (``serve``, ``demo``).
"""

from __future__ import annotations

import typer

from services.client.cli import (
    admin,
    attention,
    attention_jobs,
    captioned,
    captioned_jobs,
    datasets,
    direct,
    edit,
    edit_jobs,
    embedded,
    evaluate,
    evaluation_jobs,
    exports,
    findings,
    inspection,
    interchange,
    jobs,
    models,
    operations,
    pairs,
    running_jobs,
    webhooks,
)
from services.client.cli.terminal import TypedErrors

app = typer.Typer(
    name="cffa",
    cls=TypedErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Makes new registered pairs of colour fundus photographs (CF) and fluorescein angiographies (FA).",
    epilog="Start with: cffa demo",
)
for group in (
    embedded,
    jobs,
    evaluation_jobs,
    attention_jobs,
    captioned,
    captioned_jobs,
    edit_jobs,
    exports,
    running_jobs,
    inspection,
    pairs,
    webhooks,
    direct,
    attention,
    datasets,
    evaluate,
    edit,
    findings,
    models,
    interchange,
    admin,
    operations,
):
    group.register(app)


def main() -> None:
    """Console entry: exit code 0 if all went well, 1 after a typed failure, 2 for wrong usage."""
    app(prog_name="cffa")


__all__ = ["app", "main"]
