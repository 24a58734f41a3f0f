"""Every file of an attention job: pictures, sheets, tensors, and the report as JSON and for people.

Computes no map: `recipes.attention` fills the `recipes.attention_sheets.CapturedPair` that is written here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from cffa_core.attention.heat import overlay
from cffa_core.jobs.spec import AttentionSettings
from cffa_core.methods.pair_sampler import synthetic_marks, write_png
from cffa_core.recipes.attention_sheets import (
    NAMES,
    CapturedPair,
    Floats,
    Look,
    WordMap,
    layers_sheet,
    looked,
    main_sheet,
    steps_sheet,
)

FORMAT = "cffa-attention/1"


def write_report(seen: CapturedPair, out: Path) -> dict[str, Any]:
    """Write all files of an attention job below ``out``; returns the content of ``report.json``."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for m in NAMES:
        marks = synthetic_marks(m, seen.pair.index, seen.pair.seed, seen.pair.model_digest)
        files[m] = write_png(out, f"{m}.png", seen.picture(m), marks)
    words = [_word(seen, number, word, out) for number, word in enumerate(seen.words)]
    looks = [_look(seen, number, look, out) for number, look in enumerate(seen.looks)]
    files["sheet"] = write_png(out, "sheet.png", main_sheet(seen))
    if seen.words_by_step or seen.looks_by_step:
        files["steps"] = write_png(out, "steps.png", steps_sheet(seen))
    if seen.words_by_layer or seen.looks_by_layer:
        files["layers"] = write_png(out, "layers.png", layers_sheet(seen))
    (out / "maps.safetensors").write_bytes(save(_tensors(seen)))
    report = {
        "format": FORMAT,
        "method": seen.method,
        "model_digest": seen.pair.model_digest,
        "settings": seen.settings.model_dump(mode="json", include=set(AttentionSettings.model_fields)),
        "prompts": dict(seen.prompts),
        "pair": {"index": seen.pair.index, "seed": seen.pair.seed, "fa_chroma": seen.pair.fa_chroma},
        "forwards": seen.forwards,
        "kept_steps": list(range(seen.forwards)) if seen.settings.steps is None else sorted(seen.settings.steps),
        "layers": [{"name": layer.name, "kind": layer.kind, "place": layer.place} for layer in seen.layers],
        "words": words,
        "words_correlate": {m: _correlation([word.heat for word in seen.words if word.modality == m]) for m in NAMES},
        "looks": looks,
        "files": files,
        "maps": "maps.safetensors",
    }
    (out / "report.md").write_text(_markdown(report), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return report


def _word(seen: CapturedPair, number: int, word: WordMap, out: Path) -> dict[str, Any]:
    name = f"overlays/{word.modality}/{number:03d}-{_slug(word.word)}.png"
    write_png(out, name, overlay(seen.picture(word.modality), word.heat))
    return {
        "modality": word.modality,
        "word": word.word,
        "tokens": list(word.positions),
        "mean": round(float(word.heat.mean()), 6),
        "peak": round(float(word.heat.max()), 6),
        "peak_at": _hottest(word.heat),
        "overlay": name,
    }


def _look(seen: CapturedPair, number: int, look: Look, out: Path) -> dict[str, Any]:
    name = f"overlays/self/{number:03d}-{look.asker}-on-{look.modality}.png"
    write_png(out, name, looked(seen, look))
    return {
        "from": look.asker,
        "modality": look.modality,
        "point": list(look.point),
        "share": round(float(look.heat.sum()), 6),
        "peak_at": _hottest(look.heat),
        "overlay": name,
    }


def _hottest(heat: Floats) -> list[float]:
    """Centre of the hottest cell as (x, y), fractions of the picture."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    return [round((int(column) + 0.5) / heat.shape[1], 4), round((int(row) + 0.5) / heat.shape[0], 4)]


def _correlation(maps: Sequence[Floats]) -> float | None:
    """Mean Pearson correlation of all pairs of maps: near 1, the words all look at the same places. None below two."""
    if len(maps) < 2:
        return None
    flat = np.stack([heat.ravel() for heat in maps]).astype(np.float64)
    flat -= flat.mean(1, keepdims=True)
    lengths = np.linalg.norm(flat, axis=1)
    found = (flat @ flat.T) / np.maximum(np.outer(lengths, lengths), 1e-30)
    return round(float(found[np.triu_indices(len(maps), 1)].mean()), 4)


def _slug(word: str) -> str:
    """A word as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:40] or "word"


def _tensors(seen: CapturedPair) -> dict[str, Floats]:
    """``cross/cf (words, h, w)``, ``self/cf (looks, h, w)``; ``steps/000012/...`` and ``layers/NAME/...`` likewise."""
    found = _grouped("", seen.words, seen.looks)
    for step in sorted({*seen.words_by_step, *seen.looks_by_step}):
        found |= _grouped(f"steps/{step:06d}/", seen.words_by_step[step], seen.looks_by_step[step])
    for name, words in seen.words_by_layer.items():
        found |= _grouped(f"layers/{name}/", words, ())
    for name, looks in seen.looks_by_layer.items():
        found |= _grouped(f"layers/{name}/", (), looks)
    return found


def _grouped(prefix: str, words: Sequence[WordMap], looks: Sequence[Look]) -> dict[str, Floats]:
    groups: dict[str, list[Floats]] = {}
    for word in words:
        groups.setdefault(f"{prefix}cross/{word.modality}", []).append(word.heat)
    for look in looks:
        groups.setdefault(f"{prefix}self/{look.modality}", []).append(look.heat)
    return {name: np.ascontiguousarray(np.stack(maps)) for name, maps in groups.items()}


def _markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    lines = ["# Attention", "", "![sheet](sheet.png)", ""]
    lines += [f"- {branch}: {prompt}" for branch, prompt in report["prompts"].items()]
    lines += [f"- mean of {len(report['layers'])} layers and {len(report['kept_steps'])} steps", ""]
    if report["words"]:
        lines += [
            "Share of a place's attention that a word has; the rest is the start's, the end's and the padding's.",
            "",
            "| image | word | mean | peak | peak at (x, y) |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {w['modality'].upper()} | {w['word']} | {w['mean']:.4f} | {w['peak']:.4f} | "
            f"{w['peak_at'][0]:.2f}, {w['peak_at'][1]:.2f} |"
            for w in report["words"]
        ]
        alike = [f"{m.upper()} {c:.3f}" for m, c in report["words_correlate"].items() if c is not None]
        lines += ["", f"Mean correlation of two words' maps: {', '.join(alike)}."] if alike else []
        lines.append("")
    if report["looks"]:
        lines += ["| from | point | looks into | share | most at (x, y) |", "|---|---|---|---|---|"]
        lines += [
            f"| {look['from'].upper()} | {look['point'][0]:.2f}, {look['point'][1]:.2f} | {look['modality'].upper()} | "
            f"{look['share']:.3f} | {look['peak_at'][0]:.2f}, {look['peak_at'][1]:.2f} |"
            for look in report["looks"]
        ]
        lines.append("")
    return "\n".join(lines)
