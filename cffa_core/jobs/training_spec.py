"""What a training of a pair method is asked for: method, losses, optimiser, previews (METHODS 2, 3, 6)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from cffa_core.jobs.spec_fields import (
    CF_PROMPT,
    FA_PROMPT,
    SHARE_TIMESTEPS,
    BaseName,
    Identifier,
    Kind,
    Method,
    Prompt,
    Resolution,
    SamplerSpec,
    Seed,
    Spec,
)


class LoraSpec(Spec):
    """Low-rank adapters on the attention projections (METHODS 2)."""

    rank: int = Field(default=16, ge=1, le=256)
    alpha: float = Field(default=16.0, gt=0)
    targets: tuple[Literal["to_q", "to_k", "to_v", "to_out.0"], ...] = ("to_q", "to_k", "to_v")

    @model_validator(mode="after")
    def _targets_named_once(self) -> Self:
        if not self.targets or len(set(self.targets)) != len(self.targets):
            raise ValueError("targets must name at least one projection, each once")
        return self


class LossSpec(Spec):
    """Terms of the training loss and their weights (METHODS 2)."""

    hf_lambda: float = Field(default=0.5, ge=0)
    struct_lambda: float = Field(default=0.3, ge=0)
    struct_loss: Literal["sobel", "ngf"] = "sobel"
    x0_weighting: Literal["none", "min_snr"] = "min_snr"
    eps_weighting: Literal["none", "min_snr_gamma"] = "none"
    min_snr_gamma: float = Field(default=5.0, gt=0)
    offset_noise: float = Field(default=0.1, ge=0, le=1)
    lpips_lambda: float = Field(default=0.0, ge=0, description="Pixel-space LPIPS; needs CFFA_LPIPS_WEIGHTS. 0 = off.")


class SharedAttentionSpec(Spec):
    """Where the FA looks through the CF's self-attention (METHODS 3)."""

    max_resolution: int | None = Field(
        default=None, ge=1, description="Largest latent side at which attention is shared; null = at every one."
    )
    step_range: tuple[float, float] = Field(
        default=(0.0, 1.0), description="Part of the way from noise (0) to image (1) on which attention is shared."
    )

    @model_validator(mode="after")
    def _range_runs_forward(self) -> Self:
        begin, end = self.step_range
        if not 0 <= begin < end <= 1:
            raise ValueError("step_range must be two numbers with 0 <= begin < end <= 1")
        return self


class SideBySideSpec(Spec):
    """The canvas on which CF and FA lie beside each other (METHODS 3)."""

    squeeze: bool = Field(default=True, description="Each image at half its width; false: at its full width.")


class ControlNetSpec(Spec):
    """What the ControlNets are shown (METHODS 3)."""

    vessels: Literal["frangi", "masks"] = Field(
        default="frangi", description="Vessel map: Frangi's filter on the CF, or the data set's masks/vessel/NAME.png."
    )
    tile: bool = Field(default=True, description="A second ControlNet sees the image itself, coarse and blurred.")
    tile_size: int = Field(default=32, ge=4, le=256, description="Side to which the tile image is averaged, in pixels.")
    scale: float = Field(default=1.0, gt=0, le=2, description="Weight of the ControlNets' residuals.")


class TrainSettings(Spec):
    """All settings of a training run, apart from which data set it uses."""

    method: Method = Method.DUAL_UNET
    base: BaseName = Field(default="tiny", description="`tiny`, a hub id, or the name of a folder in CFFA_MODELS_DIR.")
    resolution: Resolution = 512
    crop_to_common: bool = Field(default=False, description="Crop each pair to the area both modalities saw.")
    steps: int = Field(default=15_000, ge=1, le=1_000_000)
    batch_size: int = Field(default=1, ge=1, le=64)
    gradient_accumulation: int = Field(default=1, ge=1, le=256)
    learning_rate: float = Field(default=5e-5, gt=0, le=1)
    weight_decay: float = Field(default=1e-2, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    timesteps: Literal["independent", "shared"] = "independent"
    modalities: tuple[Literal["cf", "fa"], ...] = ("cf", "fa")
    lora: LoraSpec = LoraSpec()
    loss: LossSpec = Field(
        default=LossSpec(), description="hf_lambda and struct_lambda are 0 by default but in dual_unet."
    )
    shared_attention: SharedAttentionSpec | None = Field(default=None, description="For method shared_attention only.")
    side_by_side: SideBySideSpec | None = Field(default=None, description="For method side_by_side only.")
    controlnet: ControlNetSpec | None = Field(default=None, description="For method controlnet only.")
    ema_decay: float = Field(default=0.0, ge=0, lt=1, description="0 switches the moving average off.")
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    augment: Literal["none", "dihedral"] = "dihedral"
    colour_variants: int = Field(default=0, ge=0, le=64)
    holdout: float = Field(default=0.1, ge=0, lt=1, description="Fraction of EYES held out for validation.")
    validate_every: int = Field(default=500, ge=1)
    checkpoint_every: int = Field(default=500, ge=1)
    preview_every: int = Field(default=500, ge=1)
    preview_pairs: int = Field(default=10, ge=0, le=64)
    preview: SamplerSpec = SamplerSpec()
    cf_prompt: Prompt = CF_PROMPT
    fa_prompt: Prompt = FA_PROMPT
    seed: Seed = 42

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_method(cls, raw: Any) -> Any:
        """The other methods were trained on the noise loss alone, two of them with one timestep for both images."""
        method = raw.get("method", Method.DUAL_UNET) if isinstance(raw, dict) else Method.DUAL_UNET
        if method == Method.DUAL_UNET or method not in list(Method):
            return raw
        filled = dict(raw)
        loss = filled.get("loss", {})
        if isinstance(loss, LossSpec):
            loss = loss.model_dump(exclude_unset=True)
        if isinstance(loss, dict):
            filled["loss"] = {"hf_lambda": 0.0, "struct_lambda": 0.0, **loss}
        if method in SHARE_TIMESTEPS:
            filled.setdefault("timesteps", "shared")
        if filled.get(str(method)) is None:
            filled[str(method)] = {}
        return filled

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError("modalities must name cf, fa or both, each once")
        if self.method is not Method.DUAL_UNET and len(self.modalities) != 2:
            raise ValueError(f"{self.method} trains both modalities; dual_unet can train one alone")
        if self.method in SHARE_TIMESTEPS and self.timesteps != "shared":
            raise ValueError(f"{self.method} has one timestep for both images; leave timesteps out")
        for other in (Method.SHARED_ATTENTION, Method.SIDE_BY_SIDE, Method.CONTROLNET):
            if self.method is not other and getattr(self, other) is not None:
                raise ValueError(f"{other} holds settings of method {other}, and this is {self.method}")
        return self


class TrainingSpec(TrainSettings):
    """A training job: settings plus the data set it learns from."""

    kind: Literal[Kind.TRAINING] = Kind.TRAINING
    dataset_id: Identifier

    def settings(self) -> TrainSettings:
        """What a recipe needs of it: no ids."""
        return TrainSettings.model_validate(self.model_dump(include=set(TrainSettings.model_fields)))
