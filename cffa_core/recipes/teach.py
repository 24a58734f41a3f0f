"""Teaches a finished ``tiny`` base the words of findings: the last stages of ``pretrain``, on a base that is there.

So the shipped weights can be made again from those before them, and other budgets tried without two hours of training.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler

from cffa_core.errors import InvalidSpec, Problem
from cffa_core.models.base import load_base
from cffa_core.models.tiny import TinyParts, build_tokenizer, export_tiny

from .pretrain import encode, taught
from .pretrain_config import PretrainConfig, PretrainRun
from .pretrain_data import Progress, cache_phantoms
from .pretrain_measure import machine_name

CARD = """
## Words

Taught after all that stands above ({machine}, seed {seed}; `cffa base teach`, docs/tiny-base.md):

| stage | steps | minutes | loss |
|---|---|---|---|
{stages}

Error of the noise on held-out cells of a finding, without the finding's word over with it (1: the word means nothing):

| | ratio |
|---|---|
{ratios}

Mean squared error of the U-Net's epsilon with fixed draws at t = 200, 500, 800: {validation}.
"""


def teach_words(
    base: str | Path,
    out: Path,
    *,
    seed: int,
    work: Path,
    config: PretrainConfig | None = None,
    resume: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Write ``base`` with words that mean findings into the folder ``out``; caches and checkpoints are in ``work``.

    Returns what was measured: ``{"words": {"cf haemorrhage": ratio, ...}, ...}``. Raises :class:`InvalidSpec` for a
    base whose vocabulary is not that of ``tiny``. ``on_progress`` and ``resume`` as in :func:`~.pretrain.build_tiny`.
    """
    config = config or PretrainConfig()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_base(base)
    work.mkdir(parents=True, exist_ok=True)
    if loaded.tokenizer.get_vocab() != build_tokenizer(work / "tokenizer").get_vocab():
        message = f"{loaded.name} has another vocabulary than tiny: only a base that this project built can be taught"
        raise InvalidSpec(message, problems=(Problem("/base", "other_vocabulary", message),))
    scheduler = DDIMScheduler.from_config(loaded.scheduler_config)
    parts = TinyParts(loaded.tokenizer, loaded.text_encoder, loaded.vae, loaded.unet, scheduler)
    for learner in (parts.text_encoder, parts.unet):
        learner.requires_grad_(True)
    run = PretrainRun(seed, work, config, resume, device, on_progress or (lambda *_: None))
    train = cache_phantoms(work, "train", config.large_pairs, config.resolution, seed, run.progress)
    heldout = cache_phantoms(work, "heldout", config.heldout, config.resolution, seed, run.progress)
    latents = encode(run, parts.vae.to(device), train, config.large_pairs, 1, "train")
    unseen = encode(run, parts.vae, heldout, config.heldout, 1, "heldout")
    facts = taught(run, parts, latents, unseen, heldout.captions)
    card = loaded.folder / "README.md"
    before = card.read_text(encoding="utf-8") if card.is_file() else ""
    export_tiny(out, parts, before + _said(facts, seed))
    return facts


def _said(facts: dict[str, dict[str, float]], seed: int) -> str:
    stages = [
        f"| {name} | {facts[name]['steps']:.0f} | {facts[name]['seconds'] / 60:.1f} | {facts[name]['loss']:.4f} |"
        for name in ("text-words", "unet-words")
    ]
    return CARD.format(
        machine=machine_name(),
        seed=seed,
        stages="\n".join(stages),
        ratios="\n".join(f"| {name} | {ratio:.2f} |" for name, ratio in facts["words"].items()),
        validation=", ".join(f"{facts['unet-words'][f'val {t}']:.4f}" for t in (200, 500, 800)),
    )
