"""What a training run with placeholder tokens does beside its steps (METHODS 6): prior pictures and attention sheets.

The steps themselves are those of `methods.masked_attention`, their phases those of `training_phases`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from cffa_core.attention.heat import overlay
from cffa_core.attention.sheet import Cell, Line, draw_sheet
from cffa_core.data.pairs import Pair, PairSet
from cffa_core.diffusion.latents import LatentCache, StructureCache, Variant
from cffa_core.diffusion.masked_losses import overlap
from cffa_core.jobs.spec import SamplerSpec, TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.pair_sampler import PairSampler, to_uint8, write_png
from cffa_core.rng import derive_seed, generator

PRIOR_BATCH = 4
SHEET = "attention.png"
SHEET_PAIRS = 4
# Where half of the noise has gone: the picture's layout is there, its details are not.
SHEET_TIMESTEP = 400

OnStep = Callable[[int, int], None]


def draw_prior(model: DualUnet, settings: TrainSettings, on_step: OnStep) -> None:
    """Fill ``model.prior`` with pictures that the BASE draws from the plain prompts; nothing where none are wanted.

    Called before the first step, when every LoRA is 0 and no prompt has a token, so that the model is its base. Pair i
    depends on (seed, i) alone; CF and FA start from noises of their own. They stay latents: nothing is decoded.
    """
    spec, prior = settings.tokens, model.prior
    if spec is None or prior is None:
        return
    plain = SamplerSpec(
        steps=spec.prior_steps,
        initial_noise="independent",
        cf_prompt=settings.cf_prompt,
        fa_prompt=settings.fa_prompt,
    )
    batch = min(PRIOR_BATCH, spec.prior_images)
    sampler = PairSampler(model, plain, settings.resolution, batch, tokens=())
    drawn: dict[str, list[torch.Tensor]] = {b: [] for b in model.branches}
    batches = -(-spec.prior_images // batch)
    for number in range(batches):

        def count(done: int, total: int, before: int = number) -> None:
            on_step(before * total + done, batches * total)

        seeds = [derive_seed(settings.seed, "prior", number * batch + place) for place in range(batch)]
        rows = sampler.latents(seeds, count)
        for b, latents in zip(model.branches, rows.chunk(len(model.branches)), strict=True):
            drawn[b].append(latents.cpu())
    prior.update({b: torch.cat(found)[: spec.prior_images] for b, found in drawn.items()})


def write_attention_sheet(
    model: DualUnet, pairs: PairSet, latents: LatentCache, structures: StructureCache[Pair], seed: int, folder: Path
) -> None:
    """Draw ``attention.png``: of the first pairs, each token's mask and where the UNet looks for it, with their IoU.

    Every pair is noised to the same timestep with a noise of its own, the same at every call. ``pairs`` are best those
    that were held out.
    """
    masked, tokens = model.masked, model.tokens
    if masked is None or tokens is None or not len(pairs):
        return
    modality = model.branches[0]
    lines = []
    for index in range(min(SHEET_PAIRS, len(pairs))):
        moments = latents.moments(index, Variant())
        x0 = {b: found.mean[None] for b, found in moments.items()}
        valid = {b: found.valid[None] for b, found in moments.items()}
        drawing = generator(seed, "attention sheet", index)
        noise = {b: torch.randn(clean.shape, generator=drawing) for b, clean in x0.items()}
        timesteps = {b: torch.tensor([min(SHEET_TIMESTEP, model.schedule.steps - 1)]) for b in x0}
        structure = {name: found[None] for name, found in structures.of(index).items()}
        maps = masked.maps(x0, valid, structure, timesteps, noise)
        pair = pairs[index]
        picture = to_uint8(pair.cf if modality == "cf" else pair.fa.expand(3, -1, -1))
        cells = [Cell(picture, pair.name)]
        for place, name in enumerate(tokens.names):
            target = structure["targets"][0, place]
            if not bool(target.any()):
                continue
            cells.append(Cell(_marked(picture, structure["cells"][0, place]), f"mask of <{name}>"))
            for b, found in maps.items():
                heat = found[0, place].float().cpu()
                shown = picture if b == modality else to_uint8(pair.fa.expand(3, -1, -1))
                note = f"IoU {overlap(heat, target):.2f} at {masked.side}x{masked.side}"
                cells.append(Cell(overlay(shown, heat.numpy()), f"<{name}>, {b.upper()}", note))
        lines.append(Line(pair.name, tuple(cells)))
    steps = f"step {model.step}, pictures noised to timestep {SHEET_TIMESTEP}"
    write_png(folder, SHEET, draw_sheet("Where the tokens look", steps, lines, cell=120, columns=7))


def _marked(picture: NDArray[np.uint8], cells: torch.Tensor) -> NDArray[np.uint8]:
    """The picture with all but the marked cells darkened."""
    size = (picture.shape[1], picture.shape[0])
    inside = cv2.resize(cells.numpy().astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
    return np.where(inside[..., None], picture, picture // 4).astype(np.uint8)
