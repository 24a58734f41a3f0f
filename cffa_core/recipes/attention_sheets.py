"""What was seen of a pair's attention, and the sheets that show it; computes no map and writes no file.

`recipes.attention` fills a :class:`CapturedPair`; `recipes.attention_report` writes all that is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cffa_core.attention.heat import marked, overlay
from cffa_core.attention.layers import Layer
from cffa_core.attention.sheet import Cell, Line, draw_sheet
from cffa_core.attention.store import Point
from cffa_core.jobs.spec import AttentionSettings
from cffa_core.methods.pair_sampler import NewPair

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


def looked(seen: CapturedPair, look: Look) -> Bytes:
    """The picture that is looked at under its heat map ``(H, W, 3)``, with a ring where the look comes from."""
    drawn = overlay(seen.picture(look.modality), look.heat)
    return marked(drawn, look.point) if look.asker == look.modality else drawn


def main_sheet(seen: CapturedPair) -> Bytes:
    """One line per modality, a column per word; then one per modality with what the points look at."""
    lines = []
    for m, name in NAMES.items():
        words = [word for word in seen.words if word.modality == m]
        if words:
            cells = [_word_cell(seen, word, word.word) for word in words]
            lines.append(Line(f"{name}: where each word looks", (_plain(seen, m), *cells)))
        if len(words) > 1:
            cells = [_apart_cell(seen, word, more) for word, more in zip(words, apart(words), strict=True)]
            lines.append(Line(f"{name}: what sets each word apart from the mean word", (_plain(seen, m), *cells)))
    for m, name in NAMES.items():
        cells = [_look_cell(seen, look) for look in seen.looks if look.modality == m]
        if cells:
            lines.append(Line(f"{name}: what the marked points look at", (_plain(seen, m), *cells)))
    return draw_sheet("Attention", _subtitle(seen), lines)


def apart(words: Sequence[WordMap]) -> list[Floats]:
    """By how much of the mean word's share each word has more (0.1: 10 %) or less, place by place."""
    maps = np.stack([word.heat for word in words])
    return list(np.asarray(maps / np.maximum(maps.mean(0), 1e-12) - 1, dtype=np.float32))


def steps_sheet(seen: CapturedPair) -> Bytes:
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


def layers_sheet(seen: CapturedPair) -> Bytes:
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
        cells = tuple(Cell(looked(seen, maps[number]), head) for head, maps in looks.items())
        title = f"{look.modality.upper()}: from {look.asker.upper()} at {_at(look.point)}"
        lines.append(Line(title, (_plain(seen, look.modality), *cells)))
    return lines


def _plain(seen: CapturedPair, modality: str) -> Cell:
    picture = seen.picture(modality)
    return Cell(picture if picture.ndim == 3 else np.repeat(picture[..., None], 3, axis=2), "the picture")


def _word_cell(seen: CapturedPair, word: WordMap, head: str) -> Cell:
    note = f"mean {_percent(float(word.heat.mean()))}, peak {_percent(float(word.heat.max()))}"
    return Cell(overlay(seen.picture(word.modality), word.heat), head, note)


def _apart_cell(seen: CapturedPair, word: WordMap, more: Floats) -> Cell:
    note = f"{100 * float(more.min()):+.1f} % to {100 * float(more.max()):+.1f} %"
    return Cell(overlay(seen.picture(word.modality), more), word.word, note)


def _look_cell(seen: CapturedPair, look: Look) -> Cell:
    note = "" if look.asker == look.modality else f"{_percent(float(look.heat.sum()))} of the look"
    return Cell(looked(seen, look), f"{look.asker.upper()} {_at(look.point)}", note)


def _at(point: Point) -> str:
    return f"({point[0]:.2f}, {point[1]:.2f})"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else f"{100 * share:.2f} %"


def _subtitle(seen: CapturedPair) -> str:
    spec = seen.settings.sampler
    steps = "all steps" if seen.settings.steps is None else f"steps {', '.join(map(str, seen.settings.steps))}"
    counted = [(kind, sum(layer.kind == kind for layer in seen.layers)) for kind in seen.settings.kinds]
    return (
        f"{seen.method}, pair {seen.pair.index}, {spec.scheduler.value} with {spec.steps} steps, "
        f"guidance {spec.guidance_scale:g}; mean of {' and '.join(f'{n} {kind}' for kind, n in counted)} layers "
        f"({', '.join(seen.settings.places)}), {steps}"
    )
