"""What was seen of a pair's attention, written as pictures, tensors and a report; computes no map.

`recipes.attention` fills a :class:`CapturedPair`; every file of an attention job is made here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from cffa_core.attention.heat import marked, overlay
from cffa_core.attention.layers import Layer
from cffa_core.attention.sheet import Cell, Line, draw_sheet
from cffa_core.attention.store import Point
from cffa_core.jobs.spec import AttentionSettings
from cffa_core.methods.pair_sampler import NewPair, synthetic_marks, write_png

FORMAT = "cffa-attention/1"
NAMES = {"cf": "Colour fundus (CF)", "fa": "Angiography (FA)"}
COLUMNS_OF_STEPS = 8

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class WordMap:
    """How much each place of a picture looks at a word: ``heat (h, w)``, shares of the attention in 0 ... 1."""

    modality: str
    word: str
    positions: tuple[int, ...]
    heat: Floats


@dataclass(frozen=True)
class Look:
    """How the look of ``point`` of picture ``asker`` is spread over picture ``modality``: ``heat (h, w)``.

    The sum over all pictures that it looks at is 1; only on the canvas of side_by_side are these two.
    """

    asker: str
    modality: str
    point: Point
    heat: Floats


@dataclass(frozen=True)
class CapturedPair:
    """A pair and its maps: averaged over steps and layers, and by step or layer where that was asked for."""

    settings: AttentionSettings
    pair: NewPair
    method: str
    prompts: Mapping[str, str]
    forwards: int
    layers: tuple[Layer, ...]
    words: tuple[WordMap, ...]
    looks: tuple[Look, ...]
    words_by_step: Mapping[int, tuple[WordMap, ...]]
    looks_by_step: Mapping[int, tuple[Look, ...]]
    words_by_layer: Mapping[str, tuple[WordMap, ...]]
    looks_by_layer: Mapping[str, tuple[Look, ...]]

    def picture(self, modality: str) -> Bytes:
        """CF ``(H, W, 3)``, FA ``(H, W)``."""
        found = self.pair.cf if modality == "cf" else self.pair.fa
        if found is None:
            raise ValueError(f"the pair has no {modality}")
        return found


def write_report(seen: CapturedPair, out: Path) -> dict[str, Any]:
    """Write all files of an attention job below ``out``; returns the content of ``report.json``."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for m in NAMES:
        marks = synthetic_marks(m, seen.pair.index, seen.pair.seed, seen.pair.model_digest)
        files[m] = write_png(out, f"{m}.png", seen.picture(m), marks)
    words = [_word(seen, number, word, out) for number, word in enumerate(seen.words)]
    looks = [_look(seen, number, look, out) for number, look in enumerate(seen.looks)]
    files["sheet"] = write_png(out, "sheet.png", _sheet(seen))
    if seen.words_by_step or seen.looks_by_step:
        files["steps"] = write_png(out, "steps.png", _steps(seen))
    if seen.words_by_layer or seen.looks_by_layer:
        files["layers"] = write_png(out, "layers.png", _layers(seen))
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
    write_png(out, name, _looked(seen, look))
    return {
        "from": look.asker,
        "modality": look.modality,
        "point": list(look.point),
        "share": round(float(look.heat.sum()), 6),
        "peak_at": _hottest(look.heat),
        "overlay": name,
    }


def _looked(seen: CapturedPair, look: Look) -> Bytes:
    drawn = overlay(seen.picture(look.modality), look.heat)
    return marked(drawn, look.point) if look.asker == look.modality else drawn


def _hottest(heat: Floats) -> list[float]:
    """Centre of the hottest cell as (x, y), fractions of the picture."""
    row, column = np.unravel_index(int(heat.argmax()), heat.shape)
    return [round((int(column) + 0.5) / heat.shape[1], 4), round((int(row) + 0.5) / heat.shape[0], 4)]


def _slug(word: str) -> str:
    """A word as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-")[:40] or "word"


# --- sheets -----------------------------------------------------------------------------------------------------------


def _sheet(seen: CapturedPair) -> Bytes:
    """One line per modality, a column per word; then one per modality with what the points look at."""
    lines = []
    for m, name in NAMES.items():
        cells = [_word_cell(seen, word, word.word) for word in seen.words if word.modality == m]
        if cells:
            lines.append(Line(f"{name}: where each word looks", (_plain(seen, m), *cells)))
    for m, name in NAMES.items():
        cells = [_look_cell(seen, look) for look in seen.looks if look.modality == m]
        if cells:
            lines.append(Line(f"{name}: what the marked points look at", (_plain(seen, m), *cells)))
    return draw_sheet("Attention", _subtitle(seen), lines)


def _steps(seen: CapturedPair) -> Bytes:
    """A line per word or look, a column per step; of many steps, some evenly chosen."""
    steps = sorted({*seen.words_by_step, *seen.looks_by_step})
    places = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), COLUMNS_OF_STEPS)).round().astype(int))
    chosen = {f"step {steps[at]}": steps[at] for at in places}
    return draw_sheet(
        "Attention, step by step",
        _subtitle(seen),
        _broken_down(
            seen,
            {head: seen.words_by_step[step] for head, step in chosen.items()},
            {head: seen.looks_by_step[step] for head, step in chosen.items()},
        ),
        cell=128,
        columns=COLUMNS_OF_STEPS + 1,
    )


def _layers(seen: CapturedPair) -> Bytes:
    """A line per word or look, a column per layer."""
    place = {layer.name: f"{layer.place} {_number(layer.name)}" for layer in seen.layers}
    return draw_sheet(
        "Attention, layer by layer",
        _subtitle(seen),
        _broken_down(
            seen,
            {place[name]: maps for name, maps in seen.words_by_layer.items()},
            {place[name]: maps for name, maps in seen.looks_by_layer.items()},
        ),
        cell=128,
        columns=9,
    )


def _number(name: str) -> str:
    """``up_blocks.1.attentions.0.transformer_blocks.0.attn2`` -> ``1.0``; the middle has one number."""
    return ".".join(re.findall(r"\.(\d+)", name)[:-1]) or "0"


def _broken_down(
    seen: CapturedPair, words: Mapping[str, Sequence[WordMap]], looks: Mapping[str, Sequence[Look]]
) -> list[Line]:
    lines = []
    for number, word in enumerate(seen.words if words else ()):
        cells = tuple(_word_cell(seen, maps[number], head) for head, maps in words.items())
        lines.append(Line(f"{word.modality.upper()}: {word.word}", (_plain(seen, word.modality), *cells)))
    for number, look in enumerate(seen.looks if looks else ()):
        cells = tuple(Cell(_looked(seen, maps[number]), head) for head, maps in looks.items())
        title = f"{look.modality.upper()}: from {look.asker.upper()} at {_at(look.point)}"
        lines.append(Line(title, (_plain(seen, look.modality), *cells)))
    return lines


def _plain(seen: CapturedPair, modality: str) -> Cell:
    picture = seen.picture(modality)
    return Cell(picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2), "the picture")


def _word_cell(seen: CapturedPair, word: WordMap, head: str) -> Cell:
    note = f"mean {_percent(float(word.heat.mean()))}, peak {_percent(float(word.heat.max()))}"
    return Cell(overlay(seen.picture(word.modality), word.heat), head, note)


def _look_cell(seen: CapturedPair, look: Look) -> Cell:
    note = "" if look.asker == look.modality else f"{_percent(float(look.heat.sum()))} of the look"
    return Cell(_looked(seen, look), f"{look.asker.upper()} {_at(look.point)}", note)


def _at(point: Point) -> str:
    return f"({point[0]:.2f}, {point[1]:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2f} %"


def _subtitle(seen: CapturedPair) -> str:
    spec = seen.settings.sampler
    steps = "all steps" if seen.settings.steps is None else f"steps {', '.join(map(str, seen.settings.steps))}"
    return (
        f"{seen.method}, pair {seen.pair.index}, {spec.scheduler.value} with {spec.steps} steps, "
        f"guidance {spec.guidance_scale:g}; mean of {len(seen.layers)} layers "
        f"({', '.join(seen.settings.places)}), {steps}"
    )


# --- tensors and words ------------------------------------------------------------------------------------------------


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
            "Share of a place's attention that a word has; the rest goes to the other words and to the start token.",
            "",
            "| image | word | mean | peak | peak at (x, y) |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {w['modality'].upper()} | {w['word']} | {w['mean']:.4f} | {w['peak']:.4f} | "
            f"{w['peak_at'][0]:.2f}, {w['peak_at'][1]:.2f} |"
            for w in report["words"]
        ]
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
