"""What a training of a pair method is asked for: method, losses, optimiser, previews (METHODS 2, 3, 6)."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

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
    TokenName,
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


FINDING_MASKS = ("haemorrhage", "exudate", "microaneurysm", "leakage")


class TokenSpec(Spec):
    """One placeholder token: ``<name>`` in prompts, bound to a mask (METHODS 6)."""

    name: TokenName
    masks: tuple[TokenName, ...] | None = Field(
        default=None,
        min_length=1,
        description="Masks of the data set (masks/MASK/NAME.png) whose union is meant. Default: the mask called as the "
        "token; for lesion, where there is none of that name, the union of all findings.",
    )
    source: Literal["masks", "frangi"] = Field(
        default="masks", description="frangi: the map of Frangi's filter on the CF, which needs no masks; for vessels."
    )
    initial: Prompt | None = Field(
        default=None, description="Words whose embedding the token starts from. Default: its name."
    )

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if self.source == "frangi" and self.masks is not None:
            raise ValueError("a token has masks or source frangi, not both")
        return self

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of the data set's masks that may be meant; none with Frangi's filter."""
        if self.source == "frangi":
            return ()
        if self.masks is not None:
            return self.masks
        return ("lesion", *FINDING_MASKS) if self.name == "lesion" else (self.name,)


class TokensSpec(Spec):
    """Placeholder tokens learnt from masks, in two phases (METHODS 6, Break-A-Scene; docs/masked-attention.md).

    The first ``phase1_steps`` of the run train the tokens' embeddings alone, the others LoRAs and text encoder.
    """

    tokens: tuple[TokenSpec, ...] = Field(min_length=1, max_length=16, description="Tokens; a name stands for a token.")
    template: Prompt = Field(
        default="{prompt}, a photo of {tokens}",
        description="{prompt}, the prompt of the modality, may be left out; {tokens} becomes `<a> and <b>`.",
    )
    phase1_steps: int = Field(default=400, ge=0)
    phase1_learning_rate: float = Field(default=5e-4, gt=0, le=1, description="Of the embeddings; constant.")
    train_text_encoder: bool = Field(default=True, description="Phase 2 trains the text encoder beside the LoRAs.")
    text_learning_rate: float = Field(default=2e-6, gt=0, le=1, description="Phase 2: of text encoder and embeddings.")
    attention_lambda: float = Field(default=1e-2, ge=0, description="Weight of the attention loss.")
    attention_side: int = Field(
        default=16, ge=4, le=128, description="Side of the maps compared; the nearest that the UNet has is taken."
    )
    whole_share: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of phase 2's steps that take all tokens of an eye and the loss of the whole picture.",
    )
    prior_weight: float = Field(default=1.0, ge=0, description="Weight of prior preservation in phase 2; 0 = off.")
    prior_images: int = Field(default=16, ge=1, le=999, description="Pictures per modality that the base draws for it.")
    prior_steps: int = Field(default=25, ge=1, le=1000, description="Steps of the sampler that draws them.")

    @field_validator("tokens", mode="before")
    @classmethod
    def _names_are_tokens(cls, raw: Any) -> Any:
        return [{"name": one} if isinstance(one, str) else one for one in raw] if isinstance(raw, list | tuple) else raw

    @model_validator(mode="after")
    def _is_coherent(self) -> Self:
        if len({token.name for token in self.tokens}) != len(self.tokens):
            raise ValueError("name each token once")
        rest = self.template.replace("{tokens}", "", 1).replace("{prompt}", "", 1)
        if "{tokens}" not in self.template or "{" in rest or "}" in rest:
            raise ValueError("the template holds {tokens} once, {prompt} at most once and no other braces")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tokens, in order."""
        return tuple(token.name for token in self.tokens)


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
    tokens: TokensSpec | None = Field(default=None, description="For method dual_unet only: tokens bound to masks.")
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
    captions: bool = Field(
        default=False, description="Each pair's own caption is its prompt; the prompts above where it has none."
    )
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
        if self.tokens is not None:
            if self.method is not Method.DUAL_UNET:
                raise ValueError(f"tokens are learnt by method dual_unet, and this is {self.method}")
            if self.captions:
                raise ValueError("tokens have prompts of their own; leave captions out")
            if self.tokens.phase1_steps > self.steps:
                raise ValueError(f"tokens.phase1_steps is {self.tokens.phase1_steps}; the run has {self.steps} steps")
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
