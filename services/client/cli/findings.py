"""Commands about findings: which ones the pairs of a folder show, and training the classifier that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from services.client.cli import options
from services.client.cli.direct import Pairs
from services.client.cli.terminal import AsJson, print_json, print_table, progress_bars, say


def findings(
    path: Pairs,
    classifier: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Folder of a classifier; default: the shipped one."),
    ] = None,
    eye_pattern: options.EyePattern = None,
    as_json: AsJson = False,
) -> None:
    """List the findings that a classifier sees in pairs. It learned from procedural eyes alone: not for patients."""
    from cffa_core.evaluation.findings import MODALITIES, FindingsClassifier
    from cffa_core.recipes.findings_list import list_findings

    judge = FindingsClassifier.load(classifier)
    with progress_bars() as bars:
        report = list_findings(
            path, judge, eye_pattern=eye_pattern, on_progress=lambda done, total: bars("findings", done, total)
        )
    if as_json:
        print_json(report)
        return
    columns = [(m, finding) for m in MODALITIES for finding in report["seen"][m]]
    rows = [(row["name"], *(row[m][finding] for m, finding in columns)) for row in report["pairs"]]
    print_table(("pair", *(f"{m.upper()} {finding}" for m, finding in columns)), rows)
    counts = [f"{m.upper()} {finding} {report['seen'][m][finding]}" for m, finding in columns]
    say(f"seen (0.5 or more) in {len(rows)} pairs: {', '.join(counts)}")


def findings_train(
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="Folder of the classifier to make.")],
    work: Annotated[
        Path | None, typer.Option(file_okay=False, help="Caches and checkpoints; default: OUT-work. Resumes there.")
    ] = None,
    eyes: Annotated[int | None, typer.Option(min=20, help="Procedural eyes to train on.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of each of the two networks.")] = None,
    seed: options.Seed = 11,
    as_json: AsJson = False,
) -> None:
    """Train the classifier of findings anew on procedural eyes; goes on where an earlier run in --work stopped."""
    from dataclasses import replace

    from cffa_core.recipes.findings import FindingsConfig, train_findings

    config = FindingsConfig()
    if eyes is not None:
        config = replace(config, train=eyes, train_decoded=min(config.train_decoded, eyes))
    if steps is not None:
        config = replace(config, budget=replace(config.budget, steps=steps))
    with progress_bars() as bars:
        card = train_findings(
            out,
            seed=seed or 0,
            work=work or out.with_name(f"{out.name}-work"),
            config=config,
            on_progress=lambda stage, done, total, loss: bars(f"findings: {stage}", done, total),
            models_dir=options.settings().models_dir,
        )
    if as_json:
        print_json(card)
        return
    rows = [
        (row["modality"].upper(), row["finding"], row["side"], "yes" if row["decoded"] else "no",
         *(row[name]["value"] for name in ("auc", "balanced_accuracy", "accuracy")))
        for row in card["measured"]
    ]  # fmt: skip
    print_table(("image", "finding", "side", "through the VAE", "AUC", "balanced accuracy", "accuracy"), rows)
    say(f"classifier: {out}")


def register(app: typer.Typer) -> None:
    """Add these commands to the command line."""
    panel = "On this machine, without a service"
    app.command("findings", rich_help_panel=panel)(findings)
    app.command("findings-train", rich_help_panel=panel)(findings_train)
