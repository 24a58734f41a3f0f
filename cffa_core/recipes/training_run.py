"""The state of a training run: what a step, a validation, a preview and a checkpoint do to it.

`recipes.train` says when each happens. Everything that changes is here, and all of it goes into a checkpoint.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cffa_core import rng
from cffa_core.data.captions import Caption
from cffa_core.data.pairs import PairSet, turn
from cffa_core.data.token_masks import require_masks
from cffa_core.diffusion.latents import LatentCache, StructureCache, Variant, draw_variant
from cffa_core.diffusion.perceptual import Lpips
from cffa_core.diffusion.rotation import band_rotations, noise_rotation
from cffa_core.errors import Conflict, NotEnoughData, TrainingDiverged
from cffa_core.jobs.context import JobContext
from cffa_core.jobs.spec import TrainSettings
from cffa_core.methods.dual_unet import DualUnet
from cffa_core.methods.method import read_card
from cffa_core.methods.pair_sampler import PairSampler
from cffa_core.methods.registry import METHODS
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import publish, read_state, write_state
from cffa_core.recipes.caption_text import PairText
from cffa_core.recipes.masked_training import draw_prior, write_attention_sheet
from cffa_core.recipes.preview import write_previews
from cffa_core.recipes.run_folder import RunFolder
from cffa_core.recipes.training_phases import phase_at

VALIDATION_TIMESTEPS = (200, 500, 800)
# A rotation is a 4x4 matrix over thousands of cells per pair: more pairs would cost encoding time and change nothing.
ROTATION_PAIRS = 32
PREVIEW_BATCH = 5
# Of a run that draws no previews.
SAMPLE_PAIRS = 4
SAMPLE = "sample"


@dataclass(frozen=True)
class Batch:
    """Pairs of one forward: names, by branch ``x0 (B, C, h, w)`` and ``valid (B, 1, h, w)``, and control images."""

    names: list[str]
    x0: dict[str, torch.Tensor]
    valid: dict[str, torch.Tensor]
    structure: dict[str, torch.Tensor]


class TrainingRun:
    """Everything that changes while a run goes on; each method is one line of the recipe."""

    def __init__(
        self,
        settings: TrainSettings,
        pairs: PairSet,
        base: Base,
        out: Path,
        context: JobContext,
        lpips_weights: Path | None = None,
        captions: Mapping[str, Caption] | None = None,
    ) -> None:
        base.latent_shape(settings.resolution)
        lpips = Lpips.load(lpips_weights, base.device) if settings.loss.lpips_lambda else None
        train, held_out = pairs.for_training(settings.holdout, settings.seed)
        if not len(train):
            raise NotEnoughData("there is no pair to train on")
        if settings.tokens is not None:
            require_masks(train, settings.tokens)
        self.settings, self.base, self.context, self.digest = settings, base, context, pairs.digest
        self.files = RunFolder(out)
        self.train, self.held_out, self.step = train, held_out, 0
        self.split_is_given = pairs.split is not None
        self.best: dict[str, Any] | None = None
        self.validated: dict[str, Any] | None = None
        self.model = METHODS[settings.method](base, settings, lpips=lpips)
        self.text = PairText(self.model, settings, captions or {})
        self.train_latents = LatentCache(train, base.encode_images, turn, self.model.views, settings.seed)
        self.held_latents = LatentCache(held_out, base.encode_images, turn, self.model.views, settings.seed)
        self.train_structures = StructureCache(train, self.model.structure, turn)
        self.held_structures = StructureCache(held_out, self.model.structure, turn)
        self.weights = [parameter for _, parameter in self.model.named_parameters()]
        self.ema = [weight.detach().clone() for weight in self.weights] if settings.ema_decay else []
        self._begin_phase()
        self.scaler = torch.amp.GradScaler(base.device.type, enabled=settings.precision == "fp16")

    def _begin_phase(self) -> None:
        self.phase = phase_at(self.settings, self.step)
        self.optimizer = self.phase.optimizer(self.model, self.settings.weight_decay)

    def start(self) -> None:
        """Resume from the newest checkpoint, or begin: clear the folder and measure the noise rotation."""
        found = self.context.latest_checkpoint()
        if found is not None:
            self._restore(found)
            return
        self.files.clear()
        if self.model.modalities == ("cf", "fa"):
            count = min(ROTATION_PAIRS, len(self.train_latents))
            moments = []
            for index in range(count):
                self.context.progress("encoding", index, count)
                moments.append(self.model.moments_by_modality(self.train_latents.moments(index, Variant())))
            self.model.noise_rotation = noise_rotation(moments)
            self.model.band_rotations = band_rotations(moments)
        if isinstance(self.model, DualUnet):
            draw_prior(self.model, self.settings, lambda done, total: self.context.progress("prior", done, total))
        if self.split_is_given:
            self.files.note("validation_log", 0, "the data set's own split counts; holdout is left aside")
        if not len(self.held_latents):
            self.files.note("validation_log", 0, "no eye is held out: the best model is the latest")

    def train_step(self) -> None:
        """One optimiser step; ``self.step`` counts the finished ones."""
        settings, number = self.settings, self.step + 1
        generator = rng.generator(settings.seed, "step", number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.phase.rate(self.step, group["peak"])
        rate = self.optimizer.param_groups[0]["lr"]
        sums: dict[str, float] = {}
        names: list[str] = []
        for micro in range(settings.gradient_accumulation):
            batch = self._batch(self.step * settings.gradient_accumulation + micro, generator)
            names += batch.names
            text = self.text.of(batch.names)
            for loss, terms in self.model.training_parts(batch.x0, batch.valid, text, generator, batch.structure):
                scaled = self.scaler.scale(loss / settings.gradient_accumulation)
                scaled.backward()  # type: ignore[no-untyped-call]
                for name, term in {"loss": loss.detach(), **terms}.items():
                    sums[name] = sums.get(name, 0.0) + float(term) / settings.gradient_accumulation
        if not math.isfinite(sums["loss"]):
            raise self._diverged(f"the loss at step {number}", sums["loss"], names)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, settings.max_grad_norm)
        # In fp16 the scaler finds its scale by overflowing; such a step changes nothing. Otherwise it would spoil all.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise self._diverged(f"the gradient at step {number}", float(norm), names)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for average, weight in zip(self.ema, self.weights, strict=bool(self.ema)):
            average.lerp_(weight.detach(), 1 - settings.ema_decay)
        self.step = self.model.step = number
        if number == self.phase.last < settings.steps:
            self._begin_phase()
        values = {**sums, "lr": rate}
        if torch.isfinite(norm):
            values["grad_norm"] = float(norm)
        self.files.log("training_log", number, values)
        self.context.metrics(number, values)
        self.context.progress("training", number, settings.steps)

    @torch.no_grad()
    def validate(self) -> None:
        """Loss on the held-out eyes at fixed timesteps and noise; keeps the model if it is the best so far."""
        if not len(self.held_latents):
            return
        sums: dict[str, float] = {}
        draws = [(index, t) for index in range(len(self.held_latents)) for t in VALIDATION_TIMESTEPS]
        with self._averaged():
            for done, (index, t) in enumerate(draws):
                moments = self.held_latents.moments(index, Variant())
                generator = rng.generator(self.settings.seed, "validation", index, t)
                x0 = {b: found.mean.unsqueeze(0) for b, found in moments.items()}
                valid = {b: found.valid.unsqueeze(0) for b, found in moments.items()}
                noise = self.model.tied({b: torch.randn(clean.shape, generator=generator) for b, clean in x0.items()})
                timesteps = {b: torch.tensor([min(t, self.model.schedule.steps - 1)]) for b in x0}
                structure = {n: x.unsqueeze(0) for n, x in self.held_structures.of(index).items()}
                text = self.text.of([self.held_out[index].name])
                loss, terms = self.model.loss_at(x0, valid, text, timesteps, noise, structure)
                for name, term in {"loss": loss, f"loss_t{t}": loss, **terms}.items():
                    share = len(self.held_latents) if name.startswith("loss_t") else len(draws)
                    sums[name] = sums.get(name, 0.0) + float(term) / share
                self.context.progress("validation", done + 1, len(draws))
        if not math.isfinite(sums["loss"]):
            held_out = [pair.name for pair in self.held_out]
            raise self._diverged(f"the validation loss at step {self.step}", sums["loss"], held_out)
        self.files.log("validation_log", self.step, sums)
        self.context.metrics(self.step, {f"validation_{name}": value for name, value in sums.items()})
        self.validated = {"step": self.step, **sums}
        if self.best is None or sums["loss"] < self.best["loss"]:
            self.best = self.validated
            self._save_model(self.files.best)

    def preview(self) -> None:
        """Draw the preview pairs of this step; they become products of the run."""
        self._draw(self.files.previews(self.step), self.settings.preview_pairs)

    def _draw(self, target: Path, pairs: int) -> None:
        """Draw the first preview pairs, with the prompts of the training, into a new folder."""
        settings = self.settings
        batch = min(PREVIEW_BATCH, pairs)
        preview = settings.preview.model_copy(update={"cf_prompt": settings.cf_prompt, "fa_prompt": settings.fa_prompt})
        sampler = PairSampler(self.model, preview, settings.resolution, batch)

        def on_step(done: int, total: int) -> None:
            self.context.progress("preview", done, total)

        with self._averaged(), publish(target) as staging:
            write_previews(sampler, pairs, settings.seed, staging, on_step, self._preview_structures(pairs))
            if isinstance(self.model, DualUnet):
                held = (self.held_out, self.held_latents, self.held_structures)
                train = (self.train, self.train_latents, self.train_structures)
                seen = held if len(self.held_latents) else train
                write_attention_sheet(self.model, *seen, settings.seed, staging)

    def _preview_structures(self, pairs: int) -> list[dict[str, torch.Tensor]]:
        """What the preview pairs are drawn on: held-out eyes, where there are any; nothing in most methods."""
        if not self.model.takes_structure:
            return []
        held = len(self.held_latents)
        cache, count = (self.held_structures, held) if held else (self.train_structures, len(self.train_latents))
        return [cache.of(index % count) for index in range(pairs)]

    def checkpoint(self, *, with_sample: bool = False) -> None:
        """Keep this step's model among the latest three, then hand everything to the context.

        A sample is drawn as previews are, but lies in the checkpoint alone (``sample/``): it was asked for at some
        step or other, and the products of a run do not depend on that.
        """
        if not len(self.held_latents):
            self._save_model(self.files.best)
        self._save_model(self.files.latest(self.step))
        self.files.prune()
        staging = self.files.folder / ".checkpoint"
        try:
            with publish(staging) as folder:
                self.files.copy_into(folder)
                if with_sample:
                    self._draw(folder / SAMPLE, self.settings.preview_pairs or SAMPLE_PAIRS)
                write_state(folder, self._tensors(), self._state())
            self.context.save_checkpoint(self.step, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def card(self) -> dict[str, Any]:
        """Card of the best model."""
        return read_card(self.files.best)

    @staticmethod
    def _diverged(what: str, value: float, pairs: list[str]) -> TrainingDiverged:
        return TrainingDiverged(
            f"{what} (pairs {', '.join(pairs)}) is {value}; the last good checkpoint is kept. Look at these pairs, or "
            "train with a smaller learning_rate or in fp32"
        )

    def _batch(self, number: int, generator: torch.Generator) -> Batch:
        """Batch ``number`` of the run: pairs in a new order every epoch, each in a drawn variant and posterior."""
        settings, count = self.settings, len(self.train_latents)
        names: list[str] = []
        x0: dict[str, list[torch.Tensor]] = {b: [] for b in self.model.branches}
        valid: dict[str, list[torch.Tensor]] = {b: [] for b in self.model.branches}
        structure: dict[str, list[torch.Tensor]] = {}
        for place in range(number * settings.batch_size, (number + 1) * settings.batch_size):
            epoch = rng.generator(settings.seed, "epoch", place // count)
            index = int(torch.randperm(count, generator=epoch)[place % count])
            variant = draw_variant(generator, settings.augment, settings.colour_variants)
            moments = self.train_latents.moments(index, variant)
            names.append(self.train[index].name)
            for b in self.model.branches:
                x0[b].append(moments[b].sample(generator))
                valid[b].append(moments[b].valid)
            for name, image in self.train_structures.of(index, variant.turn).items():
                structure.setdefault(name, []).append(image)
        return Batch(names, *({n: torch.stack(rows) for n, rows in found.items()} for found in (x0, valid, structure)))

    def _save_model(self, folder: Path) -> None:
        now = self.validated if self.validated and self.validated["step"] == self.step else None
        with self._averaged():
            self.model.save(folder, dataset_digest=self.digest, validation=now)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Put the moving average in the weights' place (where EMA is on), for validation, previews and saved models."""
        if not self.ema:
            yield
            return
        own = [weight.detach().clone() for weight in self.weights]
        try:
            with torch.no_grad():
                for weight, average in zip(self.weights, self.ema, strict=True):
                    weight.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for weight, kept in zip(self.weights, own, strict=True):
                    weight.copy_(kept)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for place, (name, weight) in enumerate(self.model.named_parameters()):
            tensors[f"weight/{name}"] = weight
            kept = self.optimizer.state.get(weight, {})
            tensors |= {f"adamw/{name}/{key}": value for key, value in kept.items()}
            if self.ema:
                tensors[f"ema/{name}"] = self.ema[place]
        if isinstance(self.model, DualUnet):
            tensors |= {f"prior/{branch}": latents for branch, latents in (self.model.prior or {}).items()}
        return tensors

    def _state(self) -> dict[str, Any]:
        rotation, bands = self.model.noise_rotation, self.model.band_rotations
        return {
            "step": self.step,
            "identity": self._identity(),
            "best": self.best,
            "noise_rotation": None if rotation is None else rotation.tolist(),
            "band_rotations": None if bands is None else bands.tolist(),
            "scaler": self.scaler.state_dict(),
        }

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        settings = self.settings.model_dump(mode="json", include=set(TrainSettings.model_fields))
        lpips = self.model.lpips.sha256 if self.model.lpips else None
        return {"settings": settings, "dataset": self.digest, "base": self.base.digest, "lpips": lpips}

    def _restore(self, checkpoint: Path) -> None:
        tensors, state = read_state(checkpoint)
        # Settings that are younger than the checkpoint had their defaults when it was written.
        settings = TrainSettings.model_validate(state["identity"]["settings"]).model_dump(mode="json")
        mine, theirs = self._identity(), state["identity"] | {"settings": settings}
        other = [name for name in mine if theirs.get(name) != mine[name]]
        if other:
            raise Conflict(f"the checkpoint belongs to another run ({', '.join(other)} differ); use another folder")
        self.files.restore(checkpoint)
        self.step = self.model.step = state["step"]
        self.best = state["best"]
        for name in ("noise_rotation", "band_rotations"):
            found = state.get(name)
            setattr(self.model, name, None if found is None else np.array(found))
        self.scaler.load_state_dict(state["scaler"])
        self._begin_phase()
        if isinstance(self.model, DualUnet) and self.model.prior is not None:
            kept = {name.removeprefix("prior/"): x for name, x in tensors.items() if name.startswith("prior/")}
            self.model.prior.update(kept)
        with torch.no_grad():
            for place, (name, weight) in enumerate(self.model.named_parameters()):
                weight.copy_(tensors[f"weight/{name}"])
                if self.ema:
                    self.ema[place].copy_(tensors[f"ema/{name}"])
                prefix = f"adamw/{name}/"
                kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if kept:  # a weight that its phase does not train, or has not yet, has no state
                    self.optimizer.state[weight] = {
                        key: value if key == "step" else value.to(weight.device) for key, value in kept.items()
                    }
