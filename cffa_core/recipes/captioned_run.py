"""The state of a training of the captioned model: what a step, a validation and a checkpoint do to it.

`recipes.captioned` says when each happens. Step k draws its random numbers from (seed, k) alone and a checkpoint holds
everything that changes, so that a run stopped and resumed ends with the bytes of one that was not (on a CPU).
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from cffa_core import rng
from cffa_core.captioned.losses import same_text
from cffa_core.captioned.model import CaptionedModel, Draws
from cffa_core.captioned.model_folder import read_captioned_card, save_captioned
from cffa_core.captioned.vocabulary import Vocabulary
from cffa_core.data.pairs import DIHEDRAL_VARIANTS, turn
from cffa_core.errors import Conflict, TrainingDiverged
from cffa_core.jobs.captioned_spec import CaptionedTrainSettings
from cffa_core.jobs.context import JobContext
from cffa_core.models.checkpoint import publish, read_state, write_state
from cffa_core.recipes.captioned_data import CaptionedData, check_lengths, signed
from cffa_core.recipes.run_folder import RunFolder
from cffa_core.recipes.training_phases import learning_rate

WARM_UP = 50


class CaptionedRun:
    """Everything that changes while a run goes on; each method is one line of the recipe."""

    def __init__(
        self, settings: CaptionedTrainSettings, data: CaptionedData, out: Path, context: JobContext, device: str
    ) -> None:
        vocabulary = Vocabulary.of(data.train.captions)
        check_lengths(data, vocabulary, settings.sizes.max_tokens)
        self.settings, self.data, self.context = settings, data, context
        self.device = torch.device(device)
        self.files = RunFolder(out)
        self.step = 0
        self.best: dict[str, Any] | None = None
        self.model = CaptionedModel.build(settings.sizes, vocabulary, rng.derive_seed(settings.seed, "captioned"))
        self.model.to(self.device)
        self.tokens = vocabulary.encode(data.train.captions)
        self.held_tokens = vocabulary.encode(data.held_out.captions) if len(data.held_out) else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def start(self) -> None:
        """Resume from the newest checkpoint, or begin with an empty folder."""
        found = self.context.latest_checkpoint()
        if found is not None:
            self._restore(found)
            return
        self.files.clear()
        if self.held_tokens is None:
            self.files.note("validation_log", 0, "no eye is held out: the best model is the latest")

    def train_step(self) -> None:
        """One optimiser step; ``self.step`` counts the finished ones."""
        settings, number = self.settings, self.step + 1
        generator = rng.generator(settings.seed, "step", number)
        rate = learning_rate(self.step, settings.steps, settings.learning_rate) * min(1.0, number / WARM_UP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = torch.tensor([self._place(self.step * settings.batch_size + i) for i in range(settings.batch_size)])
        images = signed(self.data.train.pixels[rows])
        if settings.augment == "dihedral":
            turns = torch.randint(DIHEDRAL_VARIANTS, (len(rows),), generator=generator)
            images = torch.stack([turn(image, int(k)) for image, k in zip(images, turns, strict=True)])
        count = min(len(rows), settings.drawn_per_step or len(rows))
        draws = Draws.of(count, settings.sizes, settings.condition_dropout, generator)
        self.model.train()
        with self._autocast():
            tokens = self.tokens.rows(rows).to(self.device)
            loss, terms = self.model.training_loss(images.to(self.device), tokens, draws, settings)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_grad_norm)
        if not (math.isfinite(float(loss.detach())) and bool(torch.isfinite(norm))):
            names = ", ".join(self.data.train.names[int(row)] for row in rows[:8])
            raise TrainingDiverged(
                f"the loss at step {number} (pairs {names} ...) is {float(loss.detach())}, its gradient {float(norm)}; "
                "the last good checkpoint is kept. Train with a smaller learning_rate or in fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step = number
        values = {"loss": float(loss.detach()), **{name: float(term) for name, term in terms.items()}}
        values |= {"lr": rate, "grad_norm": float(norm)}
        self.files.log("training_log", number, values)
        self.context.metrics(number, values)
        self.context.progress("training", number, settings.steps)

    @torch.no_grad()
    def validate(self) -> None:
        """Loss and retrieval@1 on the held-out eyes, with draws that are the same each time; keeps the best model."""
        if self.held_tokens is None:
            return
        settings, count = self.settings, len(self.data.held_out)
        sums: dict[str, float] = {}
        embeddings = []
        self.model.eval()
        for start in range(0, count, settings.batch_size):
            rows = torch.arange(start, min(start + settings.batch_size, count))
            generator = rng.generator(settings.seed, "validation", start)
            images = signed(self.data.held_out.pixels[rows]).to(self.device)
            tokens = self.held_tokens.rows(rows).to(self.device)
            with self._autocast():
                draws = Draws.of(len(rows), settings.sizes, 0.0, generator)
                loss, terms = self.model.training_loss(images, tokens, draws, settings)
                text, image = self.model.text_encoder(tokens), self.model.embed_images(images)
            embeddings.append((text.float(), image.float()))
            for name, term in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0.0) + float(term) * len(rows) / count
            self.context.progress("validation", int(rows[-1]) + 1, count)
        texts, pictures = (torch.cat(part) for part in zip(*embeddings, strict=True))
        hits = retrieval(texts, pictures, same_text(self.held_tokens.ids))
        sums |= {name: float(hit.float().mean()) for name, hit in hits.items()}
        if not math.isfinite(sums["loss"]):
            raise TrainingDiverged(f"the validation loss at step {self.step} is {sums['loss']}; lower learning_rate")
        self.files.log("validation_log", self.step, sums)
        self.context.metrics(self.step, {f"validation_{name}": value for name, value in sums.items()})
        validated = {"step": self.step, **sums}
        if self.best is None or sums["loss"] < self.best["loss"]:
            self.best = validated
            self._save(validated)

    def checkpoint(self) -> None:
        """Hand everything that changes to the context."""
        if self.held_tokens is None:
            self._save(None)
        staging = self.files.folder / ".checkpoint"
        try:
            with publish(staging) as folder:
                self.files.copy_into(folder)
                write_state(folder, self._tensors(), self._state())
            self.context.save_checkpoint(self.step, staging)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def card(self) -> dict[str, Any]:
        """Card of the best model."""
        return read_captioned_card(self.files.best)

    def _place(self, place: int) -> int:
        """Which picture is number ``place`` of the run: all of them in a new order every epoch."""
        count = len(self.data.train)
        if self._order[0] != place // count:
            epoch = rng.generator(self.settings.seed, "epoch", place // count)
            self._order = (place // count, torch.randperm(count, generator=epoch))
        return int(self._order[1][place % count])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16")

    def _save(self, validation: dict[str, Any] | None) -> None:
        save_captioned(
            self.files.best,
            self.model,
            self.settings,
            step=self.step,
            dataset_digest=self.data.digest,
            captions_digest=self.data.captions_digest,
            validation=validation,
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {f"weight/{name}": value for name, value in self.model.state_dict().items()}
        for name, weight in self.model.named_parameters():
            tensors |= {f"adamw/{name}/{key}": value for key, value in self.optimizer.state[weight].items()}
        return tensors

    def _state(self) -> dict[str, Any]:
        return {"step": self.step, "identity": self._identity(), "best": self.best}

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a run to go on."""
        settings = self.settings.model_dump(mode="json", include=set(CaptionedTrainSettings.model_fields))
        return {"settings": settings, "dataset": self.data.digest, "captions": self.data.captions_digest}

    def _restore(self, checkpoint: Path) -> None:
        tensors, state = read_state(checkpoint)
        mine = self._identity()
        other = [name for name in mine if state["identity"].get(name) != mine[name]]
        if other:
            raise Conflict(f"the checkpoint belongs to another run ({', '.join(other)} differ); use another folder")
        self.files.restore(checkpoint)
        self.step, self.best = state["step"], state["best"]
        prefix = "weight/"
        self.model.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, weight in self.model.named_parameters():
            prefix = f"adamw/{name}/"
            kept = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            self.optimizer.state[weight] = {key: value.to(weight.device) for key, value in kept.items()}


def retrieval(text: torch.Tensor, image: torch.Tensor, same: torch.Tensor) -> dict[str, torch.Tensor]:
    """For each row ``(N,)`` bool: is the nearest text of a picture, and the nearest picture of a text, a right one?

    Captions repeat; right is whatever has the same text (``same`` (N, N)), since nothing could tell them apart.
    """
    cosines = F.normalize(text, dim=1) @ F.normalize(image, dim=1).T
    rows = torch.arange(len(same), device=same.device)
    return {
        "text_to_image": same[rows, cosines.argmax(dim=1)],
        "image_to_text": same[rows, cosines.argmax(dim=0)],
    }
