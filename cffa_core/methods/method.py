"""What every pair method is to training, sampling and files; each method is one file beside this one (METHODS 2, 3).

A method denoises one or two *branches*: ``cf`` and ``fa`` as rows of one batch, or ``pair``, one canvas with both. Here
is what all share: how the noise of a training step is drawn, the loss at given noise, and the model folder. Nothing
here knows schedulers, data sets or jobs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import nn

from cffa_core import rng
from cffa_core.data.pairs import Pair
from cffa_core.diffusion.latents import Moments, View
from cffa_core.diffusion.losses import ModalityLatents, NoiseSchedule, pair_loss
from cffa_core.diffusion.perceptual import Lpips, latent_distance
from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.jobs.spec import Method, NoiseMode, TrainSettings, check_tokens
from cffa_core.models.base import Base
from cffa_core.models.checkpoint import describe_files, publish, verify_files
from cffa_core.models.lora import attach_dual_lora, share_weights

MODEL_FORMAT = "cffa-model/1"

Tensors = Mapping[str, torch.Tensor]


class PairMethod:
    """A base with what a method adds to it. The base itself is left as it was: weights are shared, modules are not.

    ``adapters`` names the LoRAs (one per modality, or one for all). ``lpips`` is needed to train with
    ``lpips_lambda > 0``, and for nothing else.
    """

    method: ClassVar[Method]
    takes_structure: ClassVar[bool] = False

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
        self.band_rotations: NDArray[np.float64] | None = None
        self.step = step
        self.lpips = lpips
        self.schedule = NoiseSchedule.from_config(base.scheduler_config)
        self.unet = share_weights(base.unet)
        self.lora = attach_dual_lora(self.unet, settings.lora, self.adapters, rng.derive_seed(settings.seed, "lora"))
        if settings.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.set_up()

    def set_up(self) -> None:
        """What a method adds to UNet and LoRA; called once, when both are there."""

    # --- what is denoised ---------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRAs; their files are ``lora_NAME.safetensors``."""
        return self.modalities

    @property
    def default_noise(self) -> NoiseMode:
        """Initial noise of a sampler that names none."""
        return "shared"

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the latents that are denoised."""
        return self.modalities

    def views(self, pair: View) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What the VAE is shown of an (augmented) pair: per branch the image ``(3, H, W)`` and ``valid (1, H, W)``."""
        found = {"cf": (pair.cf, pair.valid_cf), "fa": (pair.fa.expand(3, -1, -1), pair.valid_fa)}
        return {m: found[m] for m in self.modalities}

    def prompts(self, cf_prompt: str, fa_prompt: str) -> dict[str, str]:
        """The prompt of each branch."""
        given = {"cf": cf_prompt, "fa": fa_prompt}
        return {m: given[m] for m in self.modalities}

    def with_tokens(self, prompts: Mapping[str, str], tokens: Sequence[str] | None) -> dict[str, str]:
        """The prompts with these placeholder tokens in them (None: with all that the model has).

        Raises ``InvalidSpec`` for tokens that the model does not have: only `dual_unet` can have any.
        """
        check_tokens((), tokens)
        return dict(prompts)

    def structure(self, pair: Pair) -> dict[str, torch.Tensor]:
        """What training needs of a pair beside its latents, by name ``(..., h, w)``; a flip turns the last two axes.

        Of a conditional method the control images, ``(3, H, W)`` uint8; with placeholder tokens their masks.
        """
        return {}

    def control_rows(self, structure: Tensors) -> Tensors:
        """Control images of the pairs ``(B, 3, H, W)`` as those of each row ``(R, 3, H, W)``, as the UNet sees them."""
        return {}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All that is trained, in a fixed order."""
        return self.lora.named_parameters()

    # --- training -----------------------------------------------------------------------------------------------------

    def training_parts(
        self,
        x0: Tensors,
        valid: Tensors,
        text: Tensors,
        generator: torch.Generator,
        structure: Tensors | None = None,
    ) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """The losses whose sum a step minimises; each is followed by its own backward before the next is asked for.

        In most methods there is one, :meth:`training_loss`.
        """
        yield self.training_loss(x0, valid, text, generator, structure)

    def training_loss(
        self,
        x0: Tensors,
        valid: Tensors,
        text: Tensors,
        generator: torch.Generator,
        structure: Tensors | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss of one batch and its terms, at timesteps and noise drawn from ``generator``.

        ``x0[b] (B, C, h, w)``, ``valid[b] (B, 1, h, w)`` and ``structure[name] (B, 3, H, W)`` are CPU tensors,
        ``text[b] (1, 77, D)`` is on the device; ``b`` runs over the branches.
        """
        timesteps, noise = self.draw(x0[self.branches[0]].shape, generator)
        # Only a method that takes control images is given any.
        more = (structure,) if structure else ()
        return self.loss_at(x0, valid, text, timesteps, noise, *more)

    def draw(
        self, shape: torch.Size, generator: torch.Generator
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Timesteps ``(B,)`` and noise ``shape`` of each branch: own noise, own timestep unless they are shared."""
        timesteps: dict[str, torch.Tensor] = {}
        noise: dict[str, torch.Tensor] = {}
        shared = torch.randint(self.schedule.steps, (shape[0],), generator=generator)
        for branch in self.branches:
            own = torch.randint(self.schedule.steps, (shape[0],), generator=generator)
            timesteps[branch] = shared if self.settings.timesteps == "shared" else own
            offset = torch.randn(shape[0], shape[1], 1, 1, generator=generator)
            noise[branch] = torch.randn(shape, generator=generator) + self.settings.loss.offset_noise * offset
        return self.tied(timesteps), self.tied(noise)

    def tied(self, drawn: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What each branch gets of the timesteps or the noise drawn for each: its own, unless the method ties them."""
        return drawn

    def loss_at(
        self,
        x0: Tensors,
        valid: Tensors,
        text: Tensors,
        timesteps: Tensors,
        noise: Tensors,
        structure: Tensors | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss at GIVEN ``timesteps[b] (B,)`` and ``noise[b]``; validation uses it with fixed draws."""
        return self.pair_loss_of(self.branches_at(x0, valid, text, timesteps, noise, structure))

    def branches_at(
        self,
        x0: Tensors,
        valid: Tensors,
        text: Tensors,
        timesteps: Tensors,
        noise: Tensors,
        structure: Tensors | None = None,
    ) -> dict[str, ModalityLatents]:
        """What each branch was shown and what it predicts, at GIVEN timesteps and noise, by ONE forward.

        ``text[b]`` is ``(1, 77, D)``, or ``(B, 77, D)`` with a prompt for each pair.
        """
        device, names = self.base.device, self.branches
        size = x0[names[0]].shape[0]
        clean = {b: x0[b].to(device) for b in names}
        eps = {b: noise[b].to(device) for b in names}
        t = {b: timesteps[b].to(device) for b in names}
        x_t = {b: self.schedule.add_noise(clean[b], eps[b], t[b]) for b in names}
        shown = self.control_rows({name: images.to(device) for name, images in (structure or {}).items()})
        with torch.autocast(device.type, self.base.dtype, enabled=self.base.dtype != torch.float32):
            predicted = self.predict_noise(
                torch.cat([x_t[b] for b in names]),
                torch.cat([t[b] for b in names]),
                torch.cat([text[b].expand(size, -1, -1) for b in names]),
                [b for b in names for _ in range(size)],
                *((shown,) if shown else ()),
            )
        return {
            b: ModalityLatents(clean[b], x_t[b], eps[b], t[b], valid[b].to(device), said)
            for b, said in zip(names, predicted.chunk(len(names)), strict=True)
        }

    def pair_loss_of(self, found: Mapping[str, ModalityLatents]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The pair loss of METHODS 2 and its terms, detached, of what the branches predict."""
        perceptual = None if self.lpips is None else partial(latent_distance, self.lpips, self.base.decode_open)
        return pair_loss(self.by_modality(found), self.schedule, self.settings.loss, perceptual)

    def by_modality(self, branches: Mapping[str, ModalityLatents]) -> Mapping[str, ModalityLatents]:
        """The branches of a step as ``cf`` and ``fa``, which is what the losses compare."""
        return branches

    def moments_by_modality(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        """The branches' moments as those of ``cf`` and ``fa``, from which the noise rotation is measured."""
        return moments

    def predict_noise(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        text: torch.Tensor,
        rows: Sequence[str],
        structure: Tensors | None = None,
    ) -> torch.Tensor:
        """ONE forward of the base: ``x (R, C, h, w)``, ``timesteps () | (R,)``, ``text (R, 77, D)`` -> eps_hat float32.

        ``rows`` names each row's branch, e.g. ``("cf", "cf", "fa", "fa")``; with guidance the whole list stands twice.
        Each row gets the LoRA of that name. ``structure[name] (R, 3, H, W)`` uint8 are the control images of each row.
        """
        self.lora.set_rows(rows)
        dtype = self.base.dtype
        predicted: torch.Tensor = self.unet(x.to(dtype), timesteps, text.to(dtype), return_dict=False)[0]
        return predicted.float()

    # --- sampling -----------------------------------------------------------------------------------------------------

    def noise_shape(self, resolution: int) -> tuple[int, int, int]:
        """Shape ``(C, h, w)`` of one modality's noise for images of ``resolution``."""
        return self.base.latent_shape(resolution)

    def join(self, noise: torch.Tensor) -> torch.Tensor:
        """Noise ``(M * B, C, h, w)``, all rows of the first modality first, as the rows that are denoised."""
        return noise

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, place: int, count: int) -> dict[str, torch.Tensor]:
        """Images ``(3, H, W)`` in [-1, 1] by modality of pair ``place`` of ``count`` among the denoised rows.

        One image per call of the VAE: the shape it sees is the same for every pair, and memory stays small.
        """
        return {
            m: self.base.decode(latents[number * count + place].unsqueeze(0))[0]
            for number, m in enumerate(self.modalities)
        }

    # --- the model folder ---------------------------------------------------------------------------------------------

    def save(self, folder: Path, *, dataset_digest: str, validation: Mapping[str, Any] | None) -> dict[str, Any]:
        """Write the model folder (``model.json``, ``lora_*.safetensors`` and what else is trained); return the card.

        The folder appears whole or not at all; equal models give equal bytes.
        """
        with publish(folder) as staging:
            self.write_weights(staging)
            card = {
                "format": MODEL_FORMAT,
                "method": self.settings.method.value,
                "base": {"name": self.base.name, "digest": self.base.digest},
                "settings": self.settings.model_dump(mode="json", include=set(TrainSettings.model_fields)),
                "step": self.step,
                "dataset_digest": dataset_digest,
                "validation": dict(validation) if validation is not None else None,
                "noise_rotation": None if self.noise_rotation is None else self.noise_rotation.tolist(),
                "band_rotations": None if self.band_rotations is None else self.band_rotations.tolist(),
                "default_noise": self.default_noise,
                "lpips": self.lpips and {"lambda": self.settings.loss.lpips_lambda, "sha256": self.lpips.sha256},
                "parameters": self.parameter_counts(),
                "files": describe_files(staging),
            }
            (staging / "model.json").write_text(json.dumps(card, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return card

    def parameter_counts(self) -> dict[str, int]:
        """Trained parameters of each part."""
        return {name: self.lora.parameter_count(name) for name in self.adapters}

    def write_weights(self, folder: Path) -> None:
        """Write what was trained into ``folder``, as safetensors."""
        for name in self.adapters:
            (folder / f"lora_{name}.safetensors").write_bytes(self.lora.export(name))

    def read_weights(self, folder: Path) -> None:
        """Read what :meth:`write_weights` wrote; raises ``CorruptArtifact`` or ``ModelUnavailable``."""
        for name in self.adapters:
            self.lora.load(name, folder / f"lora_{name}.safetensors")

    @classmethod
    def load(cls, folder: Path, base: Base) -> Self:
        """Load a model folder of this method onto ``base``.

        Raises ``ModelUnavailable`` if it is absent, of another method or was trained on another base,
        ``CorruptArtifact`` if its files are not those that were written.
        """
        card = read_card(folder)
        if card["method"] != cls.method.value:
            raise ModelUnavailable(f"{folder.name!r} is a model of method {card['method']}, not {cls.method.value}")
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
        if card.get("band_rotations") is not None:  # models of before have none
            model.band_rotations = np.asarray(card["band_rotations"], dtype=np.float64)
        model.read_weights(folder)
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
    if not isinstance(card, dict) or card.get("format") != MODEL_FORMAT or card.get("method") not in list(Method):
        raise ModelUnavailable(f"{folder.name}/model.json is not a {MODEL_FORMAT} of a method known here")
    return card
