"""The model card of the classifier of findings: how it was made, what it gets right, what it is not for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def card_text(card: Mapping[str, Any]) -> str:
    """README.md of a classifier from its card (findings.json)."""
    config = card["config"]
    return TEXT.format(
        seed=card["seed"],
        train=config["train"],
        decoded=config["train_decoded"],
        base=card["base"],
        steps=f"{card['trained']['cf']['steps']:.0f}",
        batch=config["budget"]["batch"],
        minutes=f"{sum(stage['seconds'] for stage in card['trained'].values()) / 60:.0f}",
        heldout=config["heldout"],
        small=config["heldout_small"],
        note=f" {card['note']}" if "note" in card else "",
        figures=figures(card),
    )


def figures(card: Mapping[str, Any]) -> str:
    """The held-out figures as a Markdown table."""
    lines = [
        "| image | finding | side | through the VAE | AUC | balanced accuracy | accuracy |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in card["measured"]:
        values = [_interval(row[name]) for name in ("auc", "balanced_accuracy", "accuracy")]
        vae = "yes" if row["decoded"] else "no"
        lines.append(f"| {row['modality'].upper()} | {row['finding']} | {row['side']} | {vae} | {' | '.join(values)} |")
    return "\n".join(lines)


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return f"{found['value']:.3f}"
    return f"{found['value']:.3f} ({found['low']:.3f}-{found['high']:.3f})"


TEXT = """\
---
license: apache-2.0
---

# findings

Two small networks that say which findings a colour fundus photograph (haemorrhage, exudate, microaneurysm) and a
fluorescein angiogram (haemorrhage, microaneurysm, leakage) show. CFFA measures with them whether a prompt or an edit
put into an image what it says.

**They have never seen an eye.** They learned from procedural phantoms alone (`cffa_core.data.phantom`). Of a photograph
of a patient they say nothing; not for diagnosis.

## How they were made

`cffa_core.recipes.findings.train_findings`, seed {seed}: {train} procedural eyes with each finding in about half of
them whatever the others are; {decoded} of the eyes also after the VAE of `{base}`, at 512, 256 and 128 px. Crops of
256 px with turns, colour jitter, noise and blur; cross-entropy of every 8 px cell against the exact masks; {steps}
steps of {batch} crops each, {minutes} minutes for both on a busy core.{note}

The image's value is the mean log-odds of its eight strongest cells, made a probability by a logistic fit per finding
and side on the held-out eyes; the threshold is 0.5. Stored in fp16; `findings.json` holds calibration, figures
and digests.

## Measured on {heldout} held-out eyes

{small} eyes at 256 and 128 px, which are brought to 512 px first. 95 % bootstrap intervals over eyes. What is said of
one half of the eyes was calibrated on the other half.

{figures}

## Limits

Small or faint lesions are missed, more so the smaller the image is; after the VAE most microaneurysms are gone. What a
generative model draws (vessels that end in nothing, dark specks) can look like a lesion to them: compare with images
drawn without the finding, never read a rate alone.
"""
