"""Generate pairs with a trained model, one part of the grid at a time: one readable script over the parts.

A part depends on (spec, model, base, training pairs) only: not on which worker makes it, how often, or what was made
before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cffa_core.errors import InvalidSpec, ModelUnavailable, Problem
from cffa_core.evaluation.pair_scores import TrainingPairs, score_pairs
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.spec import CF_PROMPT, FA_PROMPT, GenerateSettings, Method, SamplerSpec, check_structures
from cffa_core.methods.method import PairMethod, read_card
from cffa_core.methods.pair_sampler import NewPair, OnStep, PairSampler
from cffa_core.methods.registry import load_method
from cffa_core.models.base import load_base
from cffa_core.models.checkpoint import folder_digest
from cffa_core.recipes.archive import REJECTS, reject_stem
from cffa_core.recipes.gate import Try, check_gate, exhausted, fill_slots
from cffa_core.recipes.structures import Structures
from cffa_core.rng import pair_seed


def load_sampler(
    settings: GenerateSettings,
    model: Path,
    base: str | Path,
    device: str = "cpu",
    *,
    models_dir: Path | None = None,
) -> PairSampler:
    """Load base and model once for all parts. Default prompts stand for the prompts of the training.

    Raises ``ModelUnavailable`` if either is missing, they do not belong together, or the model knows one modality
    only; ``CorruptArtifact`` if the model's files are damaged; ``InvalidSpec`` for prompts the base cannot take, and
    where the model draws on structures and ``settings`` names none, or the other way round, and for tokens that the
    model does not have.
    """
    check_structures(Method(read_card(model)["method"]), settings.structures)
    loaded = load_base(base, device=device, dtype=settings.precision, models_dir=models_dir)
    trained = load_method(model, loaded)
    if len(trained.modalities) != 2:
        raise ModelUnavailable(f"the model was trained on {trained.modalities[0]} alone; a pair needs cf and fa")
    prompts = own_prompts(settings.sampler, trained)
    digest = folder_digest(model)
    return PairSampler(
        trained, prompts, settings.resolution, settings.batch_size, model_digest=digest, tokens=settings.tokens
    )


def own_prompts(sampler: SamplerSpec, model: PairMethod) -> SamplerSpec:
    """Replace default prompts by those that the model was trained with: it knows no others."""
    trained = {}
    if sampler.cf_prompt == CF_PROMPT:
        trained["cf_prompt"] = model.settings.cf_prompt
    if sampler.fa_prompt == FA_PROMPT:
        trained["fa_prompt"] = model.settings.fa_prompt
    return sampler.model_copy(update=trained)


def draw_slots(
    sampler: PairSampler,
    settings: GenerateSettings,
    slots: Sequence[Try],
    on_step: OnStep | None = None,
    structures: Structures | None = None,
    training: TrainingPairs | None = None,
) -> Iterator[tuple[NewPair, tuple[str, ...]]]:
    """Draw and score pairs for ``slots``, (index, first try) each, until all are filled or given up.

    Yields each pair with the reasons for which the gate of ``settings`` refused it (none: it fills its slot).
    ``on_step(done, total)`` counts steps of the sampler; the total grows with every batch of retries. Raises
    ``InvalidSpec`` for a gate that needs ``training`` where it is None, or pairs where the model draws one modality.
    """
    check_gate(settings.gate, training)
    if settings.gate is not None and len(sampler.model.modalities) != 2:
        message = f"a gate judges pairs; the model was trained on {sampler.model.modalities[0]} alone"
        raise InvalidSpec(message, problems=(Problem("/gate", "one_modality", message),))

    def draw(tries: Sequence[Try], number: int, batches: int) -> list[NewPair]:
        def count(done: int, total: int) -> None:
            if on_step is not None:
                on_step(number * total + done, batches * total)

        indices = [index for index, _ in tries]
        seeds = [pair_seed(settings.seed, index, attempt) for index, attempt in tries]
        given = [structures.of(index) for index in indices] if structures is not None else []
        drawn = sampler.draw(indices, seeds, count, [structure.images for structure in given])
        tried = [
            replace(pair, attempt=attempt, structure=given[place].source if given else None)
            for place, (pair, (_, attempt)) in enumerate(zip(drawn, tries, strict=True))
        ]
        whole = [(pair.cf, pair.fa) for pair in tried if pair.cf is not None and pair.fa is not None]
        if not whole:
            return tried
        return [
            replace(pair, alignment=found.alignment, novelty=found.novelty)
            for pair, found in zip(tried, score_pairs(whole, training), strict=True)
        ]

    return fill_slots(slots, settings.gate, settings.batch_size, draw)


def generate_part(
    sampler: PairSampler,
    settings: GenerateSettings,
    part: int,
    out: Path,
    context: JobContext,
    structures: Structures | None = None,
    training: TrainingPairs | None = None,
) -> dict[str, Any]:
    """Draw the pairs of ``part`` into ``out/cf/000017.png`` and ``out/fa/000017.png``, and describe them.

    Writes ``out/part.json`` and returns its content: ``pairs`` by index, each with seed, try, scores, names, sizes,
    SHA-256 and ``fa_chroma``, and ``structure`` (which one) where the pairs are drawn on ``structures``
    (`recipes.structures`); and ``exhausted``, the slots that stay empty. Pairs that the gate refused are in
    ``out/rejects``, as ``cf/000017.try00.png`` with a ``part.json`` of their own that says why.
    """
    accepted: list[dict[str, Any]] = []
    rejected: list[dict[str, Any]] = []

    def on_step(done: int, total: int) -> None:
        context.progress("sampling", done, total)

    for pair, reasons in draw_slots(sampler, settings, settings.first_tries(part), on_step, structures, training):
        if reasons:
            entry = pair.save(out / REJECTS, reject_stem(pair.index, pair.attempt))
            rejected.append(entry | {"reasons": list(reasons)})
        else:
            accepted.append(pair.save(out))
    accepted.sort(key=lambda entry: entry["index"])
    rejected.sort(key=lambda entry: (entry["index"], entry["try"]))
    empty = exhausted(rejected, [entry["index"] for entry in accepted])
    if rejected:
        _describe(out / REJECTS, {"pairs": rejected})
    return _describe(out, {"pairs": accepted, "exhausted": empty})


def _describe(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(description, indent=1, sort_keys=True) + "\n"
    (folder / "part.json").write_text(text, encoding="utf-8")
    return description
