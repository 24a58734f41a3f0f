"""Generate pairs with a trained model, one part of the grid at a time: one readable script over the parts.

A part depends on (spec, model, base) only: not on which worker makes it, how often, or what was made before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cffa_core.errors import ModelUnavailable
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.spec import CF_PROMPT, FA_PROMPT, GenerateSettings, Method, SamplerSpec, check_structures
from cffa_core.methods.method import PairMethod, read_card
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.methods.registry import load_method
from cffa_core.models.base import load_base
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
    where the model draws on structures and ``settings`` names none, or the other way round.
    """
    check_structures(Method(read_card(model)["method"]), settings.structures)
    loaded = load_base(base, device=device, dtype=settings.precision, models_dir=models_dir)
    trained = load_method(model, loaded)
    if len(trained.modalities) != 2:
        raise ModelUnavailable(f"the model was trained on {trained.modalities[0]} alone; a pair needs cf and fa")
    return PairSampler(trained, own_prompts(settings.sampler, trained), settings.resolution, settings.batch_size)


def own_prompts(sampler: SamplerSpec, model: PairMethod) -> SamplerSpec:
    """Replace default prompts by those that the model was trained with: it knows no others."""
    trained = {}
    if sampler.cf_prompt == CF_PROMPT:
        trained["cf_prompt"] = model.settings.cf_prompt
    if sampler.fa_prompt == FA_PROMPT:
        trained["fa_prompt"] = model.settings.fa_prompt
    return sampler.model_copy(update=trained)


def generate_part(
    sampler: PairSampler,
    settings: GenerateSettings,
    part: int,
    out: Path,
    context: JobContext,
    structures: Structures | None = None,
) -> dict[str, Any]:
    """Draw the pairs of ``part`` into ``out/cf/000017.png`` and ``out/fa/000017.png``, and describe them.

    Writes ``out/part.json`` and returns its content: per pair index, seed, names, sizes, SHA-256 and ``fa_chroma``, and
    ``structure`` (which one) where the pairs are drawn on ``structures`` (`recipes.structures`).
    """
    indices = settings.part_range(part)
    batches = range(0, len(indices), settings.batch_size)
    entries: list[dict[str, Any]] = []
    for number, start in enumerate(batches):
        batch = indices[start : start + settings.batch_size]

        def on_step(done: int, total: int, number: int = number) -> None:
            context.progress("sampling", number * total + done, len(batches) * total)

        seeds = [pair_seed(settings.seed, index) for index in batch]
        given = [structures.of(index) for index in batch] if structures is not None else []
        pairs = sampler.draw(batch, seeds, on_step, [structure.images for structure in given])
        sources: list[dict[str, Any]] = [{"structure": structure.source} for structure in given] or [{} for _ in pairs]
        entries += [pair.save(out) | source for pair, source in zip(pairs, sources, strict=True)]
    description = {"pairs": entries}
    out.mkdir(parents=True, exist_ok=True)
    (out / "part.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return description
