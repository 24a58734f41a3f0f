"""The last stages of the ``tiny`` base: its words come to mean findings, and all else stays as it was.

Captions alone do not teach that: lesions are under a hundredth of an image's cells, and a text encoder trained with the
U-Net gave all findings the same vector. Here the encoder first learns to say what a prompt names; then the U-Net learns
what that looks like, on the lesions' cells. The model as it was before is the teacher of the rest (Li & Hoiem 2017,
"Learning without forgetting"): prompts without findings, and every cell without a lesion.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cffa_core.data.phantom import (
    CF_PROMPT,
    FA_PROMPT,
    FINDINGS,
    PHASES,
    SEEN_IN,
    WORDS,
    make_caption,
    make_phantom,
)
from cffa_core.models.tiny import TinyParts
from cffa_core.rng import derive_seed, generator

from .pretrain_config import PretrainRun
from .pretrain_data import Progress
from .pretrain_loop import Budget, train_stage, write_tensors
from .pretrain_unet import noised, tokens

CELL = 8  # pixels a side
FORMS = (0.1, 0.25, 0.5, 0.75)  # of prompts: none, the modality's, bare words, words after the modality's, caption
TOLD = 2  # the first form that names findings
LESION_WEIGHT = 5.0  # of a lesion's cell where the prompt names it; 1 elsewhere
ILL_SHARE = 0.75  # of the rows of a batch show a lesion; about half of all do
KEEP = 10.0  # weight of what the encoder must keep, in parts of its outputs' variance
NEAR = 0.05  # the same for prompts that name findings: they are to move as little as it takes
MODALITIES = ("cf", "fa")
PLAIN = (CF_PROMPT, FA_PROMPT)
BEHIND_THE_WORDS = 40  # position in the prompt; the longest caption has 22 tokens
M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Lesions:
    """What is where in the first pairs of a cache: ``cells`` (pairs, FINDINGS, h, w) bool, ``phase`` (pairs,) int."""

    cells: torch.Tensor
    phase: torch.Tensor

    def findings(self, row: int) -> tuple[str, ...]:
        """What image ``row`` of 2N shows: even ones are CF, odd ones FA."""
        seen = SEEN_IN[MODALITIES[row % 2]]
        return tuple(f for f in seen if self.cells[row // 2, FINDINGS.index(f)].any())

    def words(self, row: int) -> str:
        """All findings of the eye of image ``row``, those too that this image does not show; empty for none."""
        return ", ".join(WORDS[f] for f, cells in zip(FINDINGS, self.cells[row // 2], strict=True) if cells.any())

    def mask(self, row: int) -> torch.Tensor:
        """Cells of image ``row`` with any finding that can be seen in it, (h, w) bool."""
        places = [FINDINGS.index(f) for f in SEEN_IN[MODALITIES[row % 2]]]
        return self.cells[row // 2, places].any(0)

    def prompt(self, row: int, *, phase: bool, findings: Collection[str] | None = None) -> str:
        """Caption of image ``row``, with the phase of an angiogram or not; with other ``findings`` than it shows."""
        named = self.findings(row) if findings is None else findings
        return make_caption(MODALITIES[row % 2], named, PHASES[int(self.phase[row // 2])] if phase else None)


def cache_lesions(work: Path, split: str, pairs: int, resolution: int, seed: int, progress: Progress) -> Lesions:
    """Lesion cells of the first ``pairs`` phantoms of a cache, kept in ``work``; read back where they exist."""
    path = work / f"lesions-{split}-{pairs}x{resolution}-seed{seed}.safetensors"
    if not path.exists():
        make = partial(_cells, seed, split, resolution)
        found: list[tuple[npt.NDArray[np.uint8], int]] = []
        with ExitStack() as stack:
            made: Iterable[tuple[npt.NDArray[np.uint8], int]] = map(make, range(pairs))
            if pairs > 16:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 16)))
                made = pool.imap(make, range(pairs), chunksize=4)
            for one in made:
                found.append(one)
                progress(f"lesions-{split}", len(found), pairs, 0.0)
        cells = torch.from_numpy(np.stack([cell for cell, _ in found]))
        write_tensors(path, {"cells": cells, "phase": torch.tensor([phase for _, phase in found])})
    stored = load_file(path)
    return Lesions(stored["cells"].bool(), stored["phase"])


def _cells(seed: int, split: str, resolution: int, index: int) -> tuple[npt.NDArray[np.uint8], int]:
    phantom = make_phantom(derive_seed(seed, "tiny", split, index), resolution)
    side = resolution // CELL
    grown = [cv2.dilate(phantom.masks[f].astype(np.uint8), np.ones((3, 3), np.uint8)) for f in FINDINGS]
    cells = np.stack(grown).reshape(len(FINDINGS), side, CELL, side, CELL).max((2, 4))
    return np.asarray(cells, np.uint8), PHASES.index(phantom.phase)


def teach_text(run: PretrainRun, parts: TinyParts, budget: Budget) -> dict[str, float]:
    """Train the text encoder alone until a linear head reads findings off its output.

    Off the mean over all positions and off the mean over those behind the words: where cross-attention looks, and what
    it sees when it looks elsewhere. Prompts without findings keep their encoding, or CF and FA would part: what the
    same noise becomes in both depends on how near their prompts are.
    """
    text, before = parts.text_encoder.to(run.device), frozen(parts.text_encoder, run.device)
    stage = "text-words"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, stage, "head") % 2**32)
        head = torch.nn.Linear(text.config.hidden_size, len(FINDINGS)).to(run.device)
    plain = ["", *PLAIN, *(make_caption("fa", (), phase) for phase in PHASES)]
    kept = tokens(parts, plain).to(run.device)
    with torch.no_grad():
        as_before = before(kept).last_hidden_state
        spread = float(as_before.var())

    def loss(step: int, shard: int) -> torch.Tensor:
        rng = np.random.default_rng(derive_seed(run.seed, stage, step, shard))
        drawn = [_random_caption(rng) for _ in range(budget.per_shard)]
        ids = tokens(parts, [prompt for prompt, _ in drawn]).to(run.device)
        context = text(ids).last_hidden_state
        truth = torch.tensor([named for _, named in drawn], device=run.device)
        pooled = (context.mean(1), context[:, BEHIND_THE_WORDS:].mean(1))
        told = torch.stack([F.binary_cross_entropy_with_logits(head(state), truth) for state in pooled]).sum()
        with torch.no_grad():
            near = before(ids).last_hidden_state
        moved = F.mse_loss(text(kept).last_hidden_state, as_before)
        return told + (KEEP * moved + NEAR * F.mse_loss(context, near)) / spread

    facts = train_stage(
        stage, run.work, {"text_encoder": text, "head": head}, loss, budget, resume=run.resume,
        every=run.config.every, ema=None, progress=run.progress,
    )  # fmt: skip
    text.eval()
    return facts


def frozen(module: M, device: torch.device) -> M:
    """A copy that learns nothing any more."""
    return copy.deepcopy(module).to(device).requires_grad_(False).eval()


def _random_caption(rng: np.random.Generator) -> tuple[str, list[float]]:
    """A prompt, and which findings it names: a caption, the words after the modality's prompt, or the words alone."""
    modality = MODALITIES[int(rng.integers(2))]
    form = int(rng.integers(3))
    named = [f for f in (SEEN_IN[modality] if form == 0 else FINDINGS) if rng.random() < 0.5]
    words = ", ".join(WORDS[f] for f in named)
    phase = PHASES[int(rng.integers(len(PHASES)))] if modality == "fa" and rng.random() < 0.5 else None
    plain = PLAIN[MODALITIES.index(modality)]
    prompts = make_caption(modality, named, phase), f"{plain}, with {words}" if words else plain, words or plain
    return prompts[form], [float(f in named) for f in FINDINGS]


def train_words(
    run: PretrainRun, parts: TinyParts, latents: torch.Tensor, lesions: Lesions, before: TinyParts, budget: Budget
) -> dict[str, float]:
    """Train the U-Net on ``latents`` (2N, 4, h, w) of pairs with known ``lesions``; the text encoder stays.

    Where the prompt names findings, a lesion's cells learn the noise that is there, each counting LESION_WEIGHT times.
    All other cells, and prompts without findings, learn what the model ``before`` says of them: with no prompt where
    the words stand alone, so that what an edit's words add to no prompt is lesions and nothing else, otherwise with the
    modality's. Weights over timesteps are those of :func:`~.pretrain_unet.epsilon_error`.
    """
    unet = parts.unet.to(run.device, memory_format=torch.channels_last)
    teacher = frozen(before.unet, run.device).to(memory_format=torch.channels_last)
    stage, rows = "unet-words", range(len(latents))
    plain = [PLAIN[row % 2] for row in rows]
    words = [lesions.words(row) for row in rows]
    named = [f"{prompt}, with {said}" if said else prompt for said, prompt in zip(words, plain, strict=True)]
    full = [lesions.prompt(row, phase=row % 2 == 1) for row in rows]
    empty = [""] * len(rows)
    asked = [empty, plain, [said or prompt for said, prompt in zip(words, plain, strict=True)], named, full]
    silent = ["" if said else prompt for said, prompt in zip(words, plain, strict=True)]
    healthy = [lesions.prompt(row, phase=row % 2 == 1, findings=()) for row in rows]
    taught = [empty, plain, silent, plain, healthy]
    ids, old_ids = (torch.stack([tokens(parts, prompts) for prompts in forms]) for forms in (asked, taught))
    mask = torch.stack([lesions.mask(row) for row in rows])
    ill = torch.tensor([row for row in rows if lesions.findings(row)], dtype=torch.long)
    text = frozen(parts.text_encoder, run.device)
    old_text = frozen(before.text_encoder, run.device)

    def loss(step: int, shard: int) -> torch.Tensor:
        draws = generator(run.seed, stage, step, shard)
        anywhere = torch.randint(len(latents), (budget.per_shard,), generator=draws)
        where = torch.randint(max(1, len(ill)), (budget.per_shard,), generator=draws)
        want_ill = torch.rand(budget.per_shard, generator=draws) < ILL_SHARE
        chosen = torch.where(want_ill, ill[where], anywhere) if len(ill) else anywhere
        form = torch.bucketize(torch.rand(budget.per_shard, generator=draws), torch.tensor(FORMS))
        noisy, noise, t, weight = noised(parts, latents[chosen], draws)
        noisy = noisy.to(run.device).contiguous(memory_format=torch.channels_last)
        with run.autocast():
            said = unet(noisy, t.to(run.device), encoder_hidden_states=_read(text, ids[form, chosen], run)).sample
            with torch.no_grad():
                context = _read(old_text, old_ids[form, chosen], run)
                was = teacher(noisy, t.to(run.device), encoder_hidden_states=context).sample
        lesion = (mask[chosen] & (form >= TOLD)[:, None, None])[:, None].to(run.device)
        target = torch.where(lesion, noise.to(run.device), was.float())
        error = (said.float() - target).square() * torch.where(lesion, LESION_WEIGHT, 1.0)
        return torch.as_tensor((weight.to(run.device) * error.mean((1, 2, 3))).mean())

    facts = train_stage(
        stage, run.work, {"unet": unet}, loss, budget, resume=run.resume, every=run.config.every, ema=0.995,
        progress=run.progress,
    )  # fmt: skip
    unet.eval()
    return facts


def _read(text: torch.nn.Module, ids: torch.Tensor, run: PretrainRun) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(text(ids.to(run.device)).last_hidden_state)


@torch.no_grad()
def measure_words(
    parts: TinyParts, latents: torch.Tensor, lesions: Lesions, device: torch.device, most: int = 12
) -> dict[str, float]:
    """Noise error on held-out cells of a finding, without its word over with it: ``{"cf haemorrhage": ...}``.

    1 where the word means nothing. Mean over at most ``most`` images and t = 300, 600, each with its own fixed draw; a
    finding that no image shows is left out.
    """
    parts.unet.to(device)
    parts.text_encoder.to(device)
    found = {}
    for side, modality in enumerate(MODALITIES):
        for finding in SEEN_IN[modality]:
            rows = [r for r in range(side, len(latents), 2) if finding in lesions.findings(r)][:most]
            errors = {True: 0.0, False: 0.0}
            for row, t in product(rows, (300, 600)):
                shown = lesions.findings(row)
                prompts = [
                    lesions.prompt(row, phase=side == 1, findings=named)
                    for named in (shown, [f for f in shown if f != finding])
                ]
                context = parts.text_encoder(tokens(parts, prompts).to(device)).last_hidden_state
                noise = torch.randn(latents[row].shape, generator=generator("tiny", "words", row, t))
                a = parts.scheduler.alphas_cumprod[t]
                noisy = (a.sqrt() * latents[row] + (1 - a).sqrt() * noise).to(device)
                guess = parts.unet(noisy.expand(2, -1, -1, -1), t, encoder_hidden_states=context).sample.cpu()
                where = lesions.cells[row // 2, FINDINGS.index(finding)]
                for told, one in zip((True, False), guess, strict=True):
                    errors[told] += float((one - noise).square().mean(0)[where].mean())
            if rows:
                found[f"{modality} {finding}"] = errors[False] / errors[True]
    return found
