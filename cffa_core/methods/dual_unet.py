"""`dual_unet`, the main pair method (METHODS 2): one frozen UNet, a LoRA per modality, decoupled training.

The model and its training step. How latents are cached, how pairs are drawn and how a run is driven live elsewhere
(`diffusion`, `pair_sampler`, `recipes.train`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from cffa_core import rng
from cffa_core.diffusion.losses import ModalityLatents, NoiseSchedule, pair_loss
from cffa_core.diffusion.perceptual import Lpips, latent_distance
from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.spec import Method, TrainSettings
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import describe_files, publish, verify_files
from cffa_core.models.lora import attach_dual_lora, share_weights

MODEL_FORMAT = "cffa-model/1"


class DualUnet:
    """A base with a LoRA per modality. The base itself is left as it was: weights are shared, modules are not.

    ``lpips`` is needed to train with ``lpips_lambda > 0``, and for nothing else.
    """

    def __init__(
        self,
        base: Base,
        settings: TrainSettings,
        noise_rotation: NDArray[np.float64] | None = None,
        step: int = 0,
        lpips: Lpips | None = None,
    ) -> None:
        self.base = base
        self.settings = settings
        self.modalities: tuple[str, ...] = tuple(m for m in ("cf", "fa") if m in settings.modalities)
        self.noise_rotation = noise_rotation
        self.step = step
        self.lpips = lpips
        self.schedule = NoiseSchedule.from_config(base.scheduler_config)
        self.unet = share_weights(base.unet)
        self.lora = attach_dual_lora(self.unet, settings.lora, self.modalities, rng.derive_seed(settings.seed, "lora"))
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()

    def predict_noise(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, rows: Sequence[str]
    ) -> torch.Tensor:
        """ONE forward of the base: ``x (R, C, h, w)``, ``timesteps () | (R,)``, ``text (R, 77, D)`` -> eps_hat float32.

        ``rows`` names each row's modality, e.g. ``("cf", "cf", "fa", "fa")``.
        """
        self.lora.set_rows(rows)
        dtype = self.base.dtype
        predicted: torch.Tensor = self.unet(x.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
        return predicted.float()

    def training_loss(
        self,
        x0: Mapping[str, torch.Tensor],
        valid: Mapping[str, torch.Tensor],
        text: Mapping[str, torch.Tensor],
        generator: torch.Generator,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one batch and its terms: own noise per modality, own timestep too unless ``timesteps="shared"``.

        ``x0[m] (B, C, h, w)`` and ``valid[m] (B, 1, h, w)`` are CPU tensors, ``text[m] (1, 77, D)`` is on the device.
        """
        settings = self.settings
        shape = x0[self.modalities[0]].shape
        timesteps: dict[str, torch.Tensor] = {}
        noise: dict[str, torch.Tensor] = {}
        shared = torch.randint(self.schedule.steps, (shape[0],), generator=generator)
        for m in self.modalities:
            own = torch.randint(self.schedule.steps, (shape[0],), generator=generator)
            timesteps[m] = shared if settings.timesteps == "shared" else own
            offset = torch.randn(shape[0], shape[1], 1, 1, generator=generator)
            noise[m] = torch.randn(shape, generator=generator) + settings.loss.offset_noise * offset
        return self.loss_at(x0, valid, text, timesteps, noise)

    def loss_at(
        self,
        x0: Mapping[str, torch.Tensor],
        valid: Mapping[str, torch.Tensor],
        text: Mapping[str, torch.Tensor],
        timesteps: Mapping[str, torch.Tensor],
        noise: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss at GIVEN ``timesteps[m] (B,)`` and ``noise[m]``; validation uses it with fixed draws."""
        device, names = self.base.device, self.modalities
        size = x0[names[0]].shape[0]
        clean = {m: x0[m].to(device) for m in names}
        eps = {m: noise[m].to(device) for m in names}
        t = {m: timesteps[m].to(device) for m in names}
        x_t = {m: self.schedule.add_noise(clean[m], eps[m], t[m]) for m in names}
        with torch.autocast(device.type, self.base.dtype, enabled=self.base.dtype != torch.float32):
            predicted = self.predict_noise(
                torch.cat([x_t[m] for m in names]),
                torch.cat([t[m] for m in names]),
                torch.cat([text[m].expand(size, -1, -1) for m in names]),
                [m for m in names for _ in range(size)],
            )
        branches = {
            m: ModalityLatents(clean[m], x_t[m], eps[m], t[m], valid[m].to(device), said)
            for m, said in zip(names, predicted.chunk(len(names)), strict=True)
        }
        perceptual = None if self.lpips is None else partial(latent_distance, self.lpips, self.base.decode_open)
        return pair_loss(branches, self.schedule, self.settings.loss, perceptual)

    def save(self, folder: Path, *, dataset_digest: str, validation: Mapping[str, Any] | None) -> dict[str, Any]:
        """Write the model folder (``model.json``, ``lora_cf.safetensors``, ``lora_fa.safetensors``); return the card.

        The folder appears whole or not at all; equal models give equal bytes.
        """
        with publish(folder) as staging:
            for m in self.modalities:
                (staging / f"lora_{m}.safetensors").write_bytes(self.lora.export(m))
            card = {
                "format": MODEL_FORMAT,
                "method": self.settings.method.value,
                "base": {"name": self.base.name, "digest": self.base.digest},
                "settings": self.settings.model_dump(mode="json", include=set(TrainSettings.model_fields)),
                "step": self.step,
                "dataset_digest": dataset_digest,
                "validation": dict(validation) if validation is not None else None,
                "noise_rotation": None if self.noise_rotation is None else self.noise_rotation.tolist(),
                "lpips": self.lpips and {"lambda": self.settings.loss.lpips_lambda, "sha256": self.lpips.sha256},
                "parameters": {m: self.lora.parameter_count(m) for m in self.modalities},
                "files": describe_files(staging),
            }
            (staging / "model.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return card

    @classmethod
    def load(cls, folder: Path, base: Base) -> Self:
        """Load a model folder onto ``base``.

        Raises ``ModelUnavailable`` if it is absent or was trained on another base, ``CorruptArtifact`` if its files
        are not those that were written.
        """
        card = read_card(folder)
        if card["base"]["digest"] != base.digest:
            raise ModelUnavailable(
                f"the model was trained on base {card['base']['name']!r} with other weights than {base.name!r} has here"
            )
        verify_files(folder, card["files"])
        try:
            settings = TrainSettings.model_validate(card["settings"])
        except ValidationError as error:
            raise CorruptArtifact(f"the settings in {folder.name}/model.json are not readable: {error}") from error
        rotation = None if card["noise_rotation"] is None else np.asarray(card["noise_rotation"], dtype=np.float64)
        model = cls(base, settings, rotation, card["step"])
        for m in model.modalities:
            model.lora.load(m, folder / f"lora_{m}.safetensors")
        return model


def read_card(folder: Path) -> dict[str, Any]:
    """Read ``model.json`` of a model folder without loading weights."""
    path = folder / "model.json"
    if not path.is_file():
        raise ModelUnavailable(f"{folder.name!r} is no model folder: it has no model.json")
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptArtifact(f"{folder.name}/model.json is not JSON: {error}") from error
    if not isinstance(card, dict) or card.get("format") != MODEL_FORMAT or card.get("method") != Method.DUAL_UNET:
        raise ModelUnavailable(f"{folder.name}/model.json is not a {MODEL_FORMAT} of method {Method.DUAL_UNET.value}")
    return card
