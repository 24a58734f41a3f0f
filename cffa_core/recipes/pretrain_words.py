"""The last stages of the ``tiny`` base: its words come to mean findings.

Captions alone do not teach that: lesions are under a hundredth of an image's cells, and a text encoder trained with the
U-Net gave all findings the same vector. Here the encoder first learns to say what a prompt names; then U-Net and
encoder train on with the noise's error on lesion cells counted more, on eyes of which most have lesions.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from cffa_core.data.phantom import CF_PROMPT, FA_PROMPT, FINDINGS, PHASES, SEEN_IN, WORDS, make_caption, make_phantom
from cffa_core.models.tiny import TinyParts
from cffa_core.rng import derive_seed, generator

from .pretrain_config import PretrainRun
from .pretrain_data import Progress
from .pretrain_loop import Budget, train_stage, write_tensors
from .pretrain_unet import epsilon_error, tokens


@dataclass(frozen=True)
class Emphasis:
    """How much lesions count: ``weight`` is added to their cells' 1, ``share`` of a batch's rows have some for sure."""

    weight: float
    share: float


# First what lesions look like. That alone makes them common and leaves layout behind: discs and apertures went missing
# from samples. Then all as it is in the data, where about half of the images have lesions.
LESSONS = {"unet-words": Emphasis(10.0, 0.75), "unet-settled": Emphasis(2.0, 0.0)}
CELL = 8  # pixels a side
FORMS = (0.1, 0.25, 0.4, 0.65)  # of prompts: none, bare words, words after the prompt, caption without phase, caption
MODALITIES = ("cf", "fa")
BEHIND_THE_WORDS = 40  # position in the prompt; the longest caption has 22 tokens


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

    def prompt(self, row: int, *, phase: bool, without: str = "") -> str:
        """Caption of image ``row``, with the phase of an angiogram or not, and ``without`` one finding's word."""
        named = [f for f in self.findings(row) if f != without]
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
    """Train the text encoder alone until a linear head reads findings, modality and phase off its output.

    Off the mean over all positions and off the mean over those behind the words: where cross-attention looks, and what
    it sees when it looks elsewhere.
    """
    text = parts.text_encoder.to(run.device)
    stage = "text-words"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.seed, stage, "head") % 2**32)
        head = torch.nn.Linear(text.config.hidden_size, len(FINDINGS) + 1 + len(PHASES)).to(run.device)

    def loss(step: int, shard: int) -> torch.Tensor:
        rng = np.random.default_rng(derive_seed(run.seed, stage, step, shard))
        drawn = [_random_caption(rng) for _ in range(budget.per_shard)]
        context = text(tokens(parts, [prompt for prompt, _ in drawn]).to(run.device)).last_hidden_state
        truth = torch.tensor([facts for _, facts in drawn], device=run.device)
        pooled = (context.mean(1), context[:, BEHIND_THE_WORDS:].mean(1))
        return torch.stack([F.binary_cross_entropy_with_logits(head(state), truth) for state in pooled]).sum()

    facts = train_stage(
        stage, run.work, {"text_encoder": text, "head": head}, loss, budget, resume=run.resume,
        every=run.config.every, ema=None, progress=run.progress,
    )  # fmt: skip
    text.eval()
    return facts


def _random_caption(rng: np.random.Generator) -> tuple[str, list[float]]:
    """A caption and what it says: each finding, FA (one half where the caption does not say), each phase."""
    modality = MODALITIES[int(rng.integers(2))]
    named = [f for f in SEEN_IN[modality] if rng.random() < 0.5]
    said = [float(f in named) for f in FINDINGS]
    if named and rng.random() < 0.25:
        return _bare(named), [*said, 0.5, *(0.0 for _ in PHASES)]
    phase = PHASES[int(rng.integers(len(PHASES)))] if modality == "fa" and rng.random() < 0.5 else None
    said += [float(modality == "fa"), *(float(p == phase) for p in PHASES)]
    return make_caption(modality, named, phase), said


def _bare(findings: Iterable[str]) -> str:
    """The words alone, as somebody would type them who asks for an edit."""
    return ", ".join(WORDS[f] for f in findings)


def train_words(
    run: PretrainRun, stage: str, parts: TinyParts, latents: torch.Tensor, lesions: Lesions, budget: Budget
) -> dict[str, float]:
    """Train U-Net and text encoder on ``latents`` (2N, 4, h, w) of pairs with known ``lesions``, a stage of LESSONS.

    Loss, noise and weights over timesteps are those of :func:`~.pretrain_unet.train_unet`, but for the cells with a
    lesion that this modality shows. One prompt in ten is empty; six in ten are the caption, with the phase or without;
    the others have the words of all findings of the eye, bare or after the modality's prompt: an edit's words go to
    both images, and an image is not to change by what it does not show.
    """
    emphasis = LESSONS[stage]
    unet, text = parts.unet.to(run.device, memory_format=torch.channels_last), parts.text_encoder.to(run.device)
    rows = range(len(latents))
    plain = [CF_PROMPT if row % 2 == 0 else FA_PROMPT for row in rows]
    words = [lesions.words(row) for row in rows]
    bare = [said or prompt for said, prompt in zip(words, plain, strict=True)]
    named = [f"{prompt}, with {said}" if said else prompt for said, prompt in zip(words, plain, strict=True)]
    short, full = ([lesions.prompt(row, phase=phase and row % 2 == 1) for row in rows] for phase in (False, True))
    forms = torch.stack([tokens(parts, prompts) for prompts in ([""] * len(rows), bare, named, short, full)])
    weight = torch.stack([1 + emphasis.weight * lesions.mask(row).float() for row in rows])
    ill = torch.tensor([row for row in rows if lesions.findings(row)], dtype=torch.long)

    def loss(step: int, shard: int) -> torch.Tensor:
        draws = generator(run.seed, stage, step, shard)
        anywhere = torch.randint(len(latents), (budget.per_shard,), generator=draws)
        where = torch.randint(max(1, len(ill)), (budget.per_shard,), generator=draws)
        want_ill = torch.rand(budget.per_shard, generator=draws) < emphasis.share
        chosen = torch.where(want_ill, ill[where], anywhere) if len(ill) else anywhere
        form = torch.bucketize(torch.rand(budget.per_shard, generator=draws), torch.tensor(FORMS))
        error = epsilon_error(run, parts, latents[chosen], forms[form, chosen], draws, weight[chosen])
        return error.mean()

    facts = train_stage(
        stage, run.work, {"unet": unet, "text_encoder": text}, loss, budget, resume=run.resume,
        every=run.config.every, ema=0.995, progress=run.progress,
    )  # fmt: skip
    unet.eval()
    text.eval()
    return facts


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
                prompts = [lesions.prompt(row, phase=side == 1, without=without) for without in ("", finding)]
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
