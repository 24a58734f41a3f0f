"""Look into the attention of one pair's sampling, and write what was seen: one readable script over the parts.

The pair is the one that a generation with these settings and a batch of one draws, to the last bit: capture changes
nothing. What is kept, and at what cost, is `attention.store`'s matter; the pictures are `recipes.attention_report`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cffa_core.attention.processors import capturing
from cffa_core.attention.store import AttentionStore, Point
from cffa_core.attention.words import word_positions, words_of
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import AttentionSettings, GenerateSettings
from cffa_core.methods.pair_sampler import NewPair, PairSampler
from cffa_core.recipes.attention_report import write_report
from cffa_core.recipes.attention_sheets import CapturedPair, Look, WordMap
from cffa_core.recipes.generate import load_sampler
from cffa_core.recipes.structures import structures_for
from cffa_core.rng import pair_seed

OnProgress = Callable[[str, int, int], None]
Floats = NDArray[np.float32]


def capture_attention(
    settings: AttentionSettings,
    model: Path,
    base: str | Path,
    out: Path,
    on_progress: OnProgress,
    *,
    device: str = "cpu",
    models_dir: Path | None = None,
) -> dict[str, Any]:
    """Draw the pair of ``settings`` with the model in folder ``model`` and write its attention to ``out``.

    Writes ``report.json`` (which is returned), ``report.md``, ``cf.png``, ``fa.png``, ``sheet.png``,
    ``maps.safetensors`` and ``overlays/``; with ``each_step`` and ``each_layer`` also ``steps.png`` and ``layers.png``.
    Raises what `recipes.generate.load_sampler` raises, and ``InvalidSpec`` for words that no prompt has.
    """
    on_progress("loading the model", 0, 1)
    sampler = load_sampler(as_generation(settings), model, base, device, models_dir=models_dir)
    on_progress("loading the model", 1, 1)
    return capture_with(sampler, settings, out, on_progress)


def as_generation(settings: AttentionSettings) -> GenerateSettings:
    """The generation whose pair ``index`` is looked into."""
    shared = settings.model_dump(include={"resolution", "sampler", "seed", "structures", "precision"})
    return GenerateSettings.model_validate(shared | {"count": settings.index + 1, "batch_size": 1})


def capture_with(
    sampler: PairSampler, settings: AttentionSettings, out: Path, on_progress: OnProgress
) -> dict[str, Any]:
    """As :func:`capture_attention`, with a model that is loaded; its batch size must be 1."""
    model = sampler.model
    words = chosen_words(model.base.tokenizer, sampler.prompts, settings) if "cross" in settings.kinds else {}
    drawn_on = structures_for(as_generation(settings), model)
    points = looked_from(settings, model.branches) if "self" in settings.kinds else []
    store = AttentionStore(
        kinds=settings.kinds,
        places=settings.places,
        keep="each" if settings.each_step else "mean",
        steps=settings.steps,
        rows=[number for number, row in enumerate(sampler.batch_rows(1)) if row.conditional],
        tokens=sorted({position for found in words.values() for _, at in found for position in at}),
        bring_to=settings.map_resolution,
        points=[point for _, _, point in points],
    )
    given = [] if drawn_on is None else [drawn_on.of(settings.index).images]
    seed = pair_seed(settings.seed, settings.index, 0)
    with capturing(model.unet, store):
        (pair,) = sampler.draw([settings.index], [seed], lambda i, n: on_progress("sampling", i, n), given)
    on_progress("drawing", 0, 1)
    captured = _seen(settings, sampler, store, pair, words, points)
    report = write_report(captured, out)
    on_progress("drawing", 1, 1)
    return report


Words = Mapping[str, Sequence[tuple[str, tuple[int, ...]]]]


def chosen_words(tokenizer: Any, prompts: Mapping[str, str], settings: AttentionSettings) -> Words:
    """By branch: the words that are shown and the positions of their tokens, in the order of the prompt or as asked.

    Raises ``InvalidSpec`` (pointers ``/tokens/i``) for words that no prompt has, naming the words there are.
    """
    if settings.tokens is None:
        asked = {branch: words_of(prompt) for branch, prompt in prompts.items()}
        return {b: [(word, word_positions(tokenizer, prompts[b], word)) for word in asked[b]] for b in prompts}
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {branch: [] for branch in prompts}
    problems = []
    for number, word in enumerate(settings.tokens):
        known = False
        for branch, prompt in prompts.items():
            try:
                found[branch].append((word, word_positions(tokenizer, prompt, word)))
                known = True
            except InvalidSpec:  # a word of the one prompt need not be in the other
                continue
        if not known:
            there = "; ".join(f"{branch}: {', '.join(words_of(prompt))}" for branch, prompt in prompts.items())
            message = f"no prompt has the word {word!r}; the words are {there}"
            problems.append(Problem(f"/tokens/{number}", "unknown_word", message))
    if problems:
        raise InvalidSpec(problems[0].message, problems=tuple(problems))
    return found


def looked_from(settings: AttentionSettings, branches: Sequence[str]) -> list[tuple[str, Point, Point]]:
    """Whose picture, point on it, and point on the latent that is denoised: a canvas has both pictures side by side."""
    if tuple(branches) != ("pair",):
        return [("both", point, point) for point in settings.points]
    if settings.map_resolution % 2:
        message = "map_resolution must be even: the canvas of side_by_side is cut in the middle"
        raise InvalidSpec(message, problems=(Problem("/map_resolution", "odd", message),))
    return [(m, (x, y), ((x + side) / 2, y)) for side, m in enumerate(("cf", "fa")) for x, y in settings.points]


def _seen(
    settings: AttentionSettings,
    sampler: PairSampler,
    store: AttentionStore,
    pair: NewPair,
    words: Words,
    points: Sequence[tuple[str, Point, Point]],
) -> CapturedPair:
    """What the store holds, as maps of words and looks of points in the two pictures."""
    steps = store.kept_steps if settings.each_step else ()
    layers = store.layers if settings.each_layer else ()
    view = _View(settings, store, sampler.model.branches, words, points)
    return CapturedPair(
        settings=settings,
        pair=pair,
        method=sampler.model.method.value,
        prompts=dict(sampler.prompts),
        forwards=store.step + 1,
        layers=store.layers,
        words=view.words(),
        looks=view.looks(),
        words_by_step={step: view.words(steps=(step,)) for step in steps},
        looks_by_step={step: view.looks(steps=(step,)) for step in steps},
        words_by_layer={found.name: view.words(layers=(found.name,)) for found in layers if found.kind == "cross"},
        looks_by_layer={found.name: view.looks(layers=(found.name,)) for found in layers if found.kind == "self"},
    )


@dataclass(frozen=True)
class _View:
    """How rows and tokens of a store become maps over the two pictures."""

    settings: AttentionSettings
    store: AttentionStore
    branches: Sequence[str]
    words_of_branch: Words
    points: Sequence[tuple[str, Point, Point]]

    def _pictures(self, row: int, maps: torch.Tensor) -> dict[str, Floats]:
        """``(T, h, w)`` of a row by picture; the canvas of side_by_side is cut."""
        found = maps.cpu().numpy()
        if self.branches[row] != "pair":
            return {self.branches[row]: found}
        middle = found.shape[-1] // 2
        return {"cf": found[..., :middle], "fa": found[..., middle:]}

    def words(self, **which: Any) -> tuple[WordMap, ...]:
        """The map of every word: how much each cell looks at any of the word's tokens."""
        if "cross" not in self.settings.kinds:
            return ()
        side = self.settings.map_resolution
        maps = self.store.average("cross", self.settings.places, side, resize=True, **which)
        place = {position: number for number, position in enumerate(self.store.tokens or ())}
        found = []
        for row, branch in enumerate(self.branches):
            for word, positions in self.words_of_branch[branch]:
                heat = maps[row, [place[position] for position in positions]].sum(0)
                found += [WordMap(m, word, positions, part) for m, part in self._pictures(row, heat).items()]
        return tuple(sorted(found, key=lambda word: word.modality))

    def looks(self, **which: Any) -> tuple[Look, ...]:
        """The map of every point: how its look is spread over the picture (over both, on a canvas)."""
        if "self" not in self.settings.kinds:
            return ()
        side = self.settings.map_resolution
        maps = self.store.average("self", self.settings.places, side, resize=True, **which)
        return tuple(
            Look(m if asker == "both" else asker, m, point, heat)
            for row in range(len(self.branches))
            for number, (asker, point, _) in enumerate(self.points)
            for m, heat in self._pictures(row, maps[row, number]).items()
        )
