"""The contracts of the service: what jobs of training, generation, evaluation and export ask for.

Pydantic models, validated when a job is posted and stored as JSON in the record; a recipe gets the same object. They
say what to compute, never where (no paths, hosts or devices). ``SPEC_VERSION`` rises when a stored
spec gains a field or changes its meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from cffa_core.errors import InvalidSpec, Problem

SPEC_VERSION = 3

CF_PROMPT = "A high quality color fundus photograph, retinal structure"
FA_PROMPT = "A high quality fluorescein angiography image, bright retinal vessels"

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z]+_[0-9a-z]{20}$")]
FolderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
BaseName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=200)
]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Resolution = Annotated[int, Field(ge=64, le=2048, multiple_of=8)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
MAX_TRIES = 100
PairIndex = Annotated[int, Field(ge=0, lt=1_000_000)]
PairTry = tuple[PairIndex, Annotated[int, Field(ge=0, lt=MAX_TRIES)]]


class Method(StrEnum):
    """Pair methods (METHODS 2, 3). A closed list: a request never names code."""

    DUAL_UNET = "dual_unet"
    SHARED_ATTENTION = "shared_attention"
    SIDE_BY_SIDE = "side_by_side"
    CONTROLNET = "controlnet"


class Kind(StrEnum):
    """Kinds of job; each has its own queue."""

    TRAINING = "training"
    GENERATION = "generation"
    EVALUATION = "evaluation"
    EXPORT = "export"


class Scheduler(StrEnum):
    """Samplers, all from diffusers."""

    DDIM = "ddim"
    PNDM = "pndm"
    DPM = "dpm++2m"
    UNIPC = "unipc"
    EULER = "euler"
    DDPM = "ddpm"


NoiseMode = Literal["shared", "rotated", "banded", "independent"]
# Methods in which both images are at the same point of the noise scale, in training as in sampling.
SHARE_TIMESTEPS = (Method.SHARED_ATTENTION, Method.SIDE_BY_SIDE)


# Methods whose pairs are drawn on a structure that is given.
ON_STRUCTURES = (Method.CONTROLNET,)


class Spec(BaseModel):
    """Base of all contracts: unknown fields are refused, objects are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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


class SamplerSpec(Spec):
    """How pairs are drawn (METHODS 2, Sampling)."""

    scheduler: Scheduler = Scheduler.DDIM
    steps: int = Field(default=50, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=1.0, le=30.0)
    initial_noise: NoiseMode | None = Field(
        default=None,
        description="Default: banded for dual_unet if its training pairs gave rotations, independent for side_by_side, "
        "else shared.",
    )
    step_noise: NoiseMode | None = Field(
        default=None, description="Noise inside a stochastic sampler; default as initial_noise."
    )
    cf_prompt: Prompt = CF_PROMPT
    fa_prompt: Prompt = FA_PROMPT
    negative_prompt: str = Field(default="", max_length=1000)


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


class GateSpec(Spec):
    """What a pair must reach to count as one of the N (docs/gates.md).

    Slot i tries the seeds ``rng.pair_seed(seed, i, k)``, k = 0 ... ``max_tries`` - 1, and takes the first pair that
    passes; a slot of which no try passes stays empty.
    """

    min_alignment: float | None = Field(
        default=None, ge=-1, le=1, description="Least ridge correlation of CF and FA; real pairs reach about 0.5."
    )
    max_similarity_to_training: float | None = Field(
        default=None, ge=0, le=1, description="Largest similarity to any pair of the model's training; a copy has 1."
    )
    max_tries: int = Field(default=8, ge=1, le=MAX_TRIES, description="Pairs drawn for one slot before it is given up.")

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.min_alignment is None and self.max_similarity_to_training is None:
            raise ValueError("a gate names min_alignment, max_similarity_to_training, or both")
        return self


class GenerateSettings(Spec):
    """All settings of a generation run, apart from which model it uses.

    The job is a fixed grid: part ``p`` holds the pairs ``p * part_size ... min(count, (p+1) * part_size) - 1``, and
    inside a part every forward has exactly ``batch_size`` rows (the last batch is padded), so that a pair does not
    depend on its neighbours (DESIGN, Generation).
    """

    count: int = Field(ge=1, le=1_000_000, description="Number of pairs N.")
    resolution: Resolution = 512
    batch_size: int = Field(default=4, ge=1, le=64)
    part_size: int = Field(default=32, ge=1, le=1024)
    sampler: SamplerSpec = SamplerSpec()
    structures: Literal["dataset", "procedural"] | None = Field(
        default=None, description="Whose vessels a model of method controlnet draws: a data set's, or procedural eyes'."
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gate: GateSpec | None = Field(default=None, description="With a gate, count is the number of ACCEPTED pairs.")
    only: tuple[PairTry, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Draw these pairs of the grid alone: (index, try) each, by rising index. Without a gate each pair "
        "is try 0 of its index; with one, the manifest says which.",
    )
    seed: Seed = 42

    @model_validator(mode="after")
    def _chosen_pairs_are_of_the_grid(self) -> Self:
        if self.only is None:
            return self
        indices = [index for index, _ in self.only]
        if indices != sorted(set(indices)) or indices[-1] >= self.count:
            raise ValueError("only names each index once, in rising order, and all of them below count")
        if self.gate is not None:
            raise ValueError("only says which try is drawn; leave the gate out")
        return self

    @property
    def indices(self) -> Sequence[int]:
        """Indices of all pairs that are asked for, rising."""
        return range(self.count) if self.only is None else tuple(index for index, _ in self.only)

    @property
    def parts(self) -> int:
        """Number of parts of the grid."""
        return -(-len(self.indices) // self.part_size)

    def part_range(self, part: int) -> Sequence[int]:
        """Pair indices of one part."""
        return self.indices[part * self.part_size : (part + 1) * self.part_size]

    def part_of(self, index: int) -> int | None:
        """The part that holds pair ``index``; None if the pair is not asked for."""
        return self.indices.index(index) // self.part_size if index in self.indices else None

    def first_tries(self, part: int) -> list[tuple[int, int]]:
        """(index, try) with which each slot of a part begins."""
        chosen = dict(self.only or ())
        return [(index, chosen.get(index, 0)) for index in self.part_range(part)]


class OriginalPair(Spec):
    """The pair that a job makes once more: whose it is, and the SHA-256 of its two files."""

    job_id: Identifier
    cf: Sha256
    fa: Sha256


class GenerationSpec(GenerateSettings):
    """A generation job: settings plus the model (the product of a finished training job) it samples from."""

    kind: Literal[Kind.GENERATION] = Kind.GENERATION
    model_id: Identifier
    structure_dataset_id: Identifier | None = Field(
        default=None, description="With structures = dataset: pair i is drawn on its pair i modulo its length."
    )
    regenerates: OriginalPair | None = Field(
        default=None,
        description="Written by :regenerate. The job draws the one pair of `only` on workers with the numerics of the "
        "job named here, and its result says whether the files are the same.",
    )

    @model_validator(mode="after")
    def _structures_come_from_somewhere(self) -> Self:
        if (self.structures == "dataset") != (self.structure_dataset_id is not None):
            raise ValueError('structure_dataset_id belongs to structures = "dataset", and to nothing else')
        return self

    @model_validator(mode="after")
    def _one_pair_is_regenerated(self) -> Self:
        if self.regenerates is not None and (self.only is None or len(self.only) != 1):
            raise ValueError("regenerates belongs to a job whose `only` names one pair")
        return self

    def settings(self) -> GenerateSettings:
        """What a recipe needs of it: no ids."""
        return GenerateSettings.model_validate(self.model_dump(include=set(GenerateSettings.model_fields)))


class EvaluateSettings(Spec):
    """All settings of an evaluation, apart from which pairs it measures against which (METHODS 8)."""

    extractor: Literal["filters", "vit"] = Field(
        default="filters", description="Feature extractor: a filter bank without weights, or a vision transformer."
    )
    extractor_model: FolderName | None = Field(
        default=None, description="With extractor vit: the transformer's folder (DINOv2, RETFound) in CFFA_MODELS_DIR."
    )
    base: BaseName | None = Field(
        default="tiny", description="Base whose VAE the real pairs go through before they are the ceiling; null: none."
    )
    max_pairs: int = Field(default=256, ge=2, le=10_000, description="Of a larger set a seeded choice is measured.")
    seed: Seed = 42

    @model_validator(mode="after")
    def _transformer_is_named(self) -> Self:
        if (self.extractor == "vit") != (self.extractor_model is not None):
            raise ValueError('extractor_model belongs to extractor = "vit", and to no other')
        return self


class EvaluationSpec(EvaluateSettings):
    """An evaluation job: the pairs of a generation job, or a data set of pairs, against real ones."""

    kind: Literal[Kind.EVALUATION] = Kind.EVALUATION
    generation_job_id: Identifier | None = Field(default=None, description="A succeeded job whose pairs are measured.")
    pairs_dataset_id: Identifier | None = Field(default=None, description="Or: a data set whose pairs are measured.")
    reference_dataset_id: Identifier = Field(description="Real pairs, best ones that no training has seen.")
    reference_split: Literal["train", "validation", "test"] | None = Field(
        default=None, description="Of a version with a split: the part of it that is the reference, best `test`."
    )
    train_dataset_id: Identifier | None = Field(
        default=None,
        description="Pairs that the model was trained on; memorisation is measured against them. Left out with a "
        "generation job, it is the data set of its model's training, if the record still knows it.",
    )

    @model_validator(mode="after")
    def _sets_are_named_once(self) -> Self:
        if (self.generation_job_id is None) == (self.pairs_dataset_id is None):
            raise ValueError("name what is measured: generation_job_id or pairs_dataset_id, one of the two")
        # Two parts of one split are two sets: no eye is in both.
        apart = self.reference_split not in (None, "train")
        if self.reference_dataset_id in (self.pairs_dataset_id, None if apart else self.train_dataset_id):
            raise ValueError(
                "reference_dataset_id must be another data set than pairs_dataset_id and train_dataset_id: a set "
                "measured against itself says nothing; upload the held-out pairs as a data set of their own"
            )
        return self

    def settings(self) -> EvaluateSettings:
        """What a recipe needs of it: no ids."""
        return EvaluateSettings.model_validate(self.model_dump(include=set(EvaluateSettings.model_fields)))


ExportForm = Literal["zip", "webdataset", "dicom"]


class SelectionSpec(Spec):
    """Which pairs of a generation job: every condition that is given must hold."""

    accepted_only: bool = Field(default=False, description="Only of a job with a gate, whose pairs passed it.")
    first: PairIndex | None = Field(default=None, description="Smallest pair index.")
    last: PairIndex | None = Field(default=None, description="Largest pair index, inclusive.")
    indices: tuple[PairIndex, ...] | None = Field(
        default=None, min_length=1, max_length=100_000, description="These pairs."
    )
    min_alignment: float | None = Field(default=None, description="Least alignment score, the one that a gate uses.")
    max_similarity_to_training: float | None = Field(
        default=None, ge=0, le=1, description="Largest similarity to the nearest training pair, 0..1."
    )

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.indices is not None and len(set(self.indices)) != len(self.indices):
            raise ValueError("indices must name each pair once")
        if self.first is not None and self.last is not None and self.first > self.last:
            raise ValueError("first must not be larger than last")
        return self

    def spans(self, index: int) -> bool:
        """Whether ``first``, ``last`` and ``indices`` let pair ``index`` in."""
        above = self.first is None or index >= self.first
        below = self.last is None or index <= self.last
        return above and below and (self.indices is None or index in self._named)

    @cached_property
    def _named(self) -> frozenset[int]:
        return frozenset(self.indices or ())


class ExportSettings(Spec):
    """In which form pairs leave, which of them, and how many share one archive."""

    form: ExportForm = Field(
        default="zip", description="zip: as the job's own archives; webdataset: tar shards; dicom: zips of DICOM files."
    )
    selection: SelectionSpec = SelectionSpec()
    shard_size: int = Field(default=1000, ge=1, le=100_000, description="Pairs per archive, the last may have fewer.")


class ExportSpec(ExportSettings):
    """An export job: pairs of a generation job in another form, of the parts that were finished when it was posted."""

    kind: Literal[Kind.EXPORT] = Kind.EXPORT
    generation_job_id: Identifier
    parts: tuple[tuple[int, int], ...] = Field(
        default=(), description="First and last number of each run of parts it takes; filled in when it is posted."
    )

    def settings(self) -> ExportSettings:
        """What a recipe needs of it: no ids."""
        return ExportSettings.model_validate(self.model_dump(include=set(ExportSettings.model_fields)))


JobSpec = Annotated[TrainingSpec | GenerationSpec | EvaluationSpec | ExportSpec, Field(discriminator="kind")]
_JOB_SPEC: TypeAdapter[JobSpec] = TypeAdapter(JobSpec)


def check_structures(method: Method, structures: str | None) -> None:
    """Raise ``InvalidSpec`` (pointer ``/structures``) if a model of ``method`` cannot be drawn from with them."""
    if (method in ON_STRUCTURES) == (structures is not None):
        return
    if structures is None:
        message = f"a model of method {method} draws on structures; say which: procedural, or a data set's"
    else:
        message = f"a model of method {method} takes no structures; leave structures out"
    raise InvalidSpec(message, problems=(Problem("/structures", "structures", message),))


def parse_spec(raw: dict[str, Any]) -> JobSpec:
    """Validate a stored or posted spec; raises :class:`InvalidSpec` with one problem per bad field."""
    try:
        return _JOB_SPEC.validate_python(raw)
    except ValidationError as error:
        problems = tuple(
            Problem(
                "/" + "/".join(str(part) for part in item["loc"] if part not in list(Kind)),
                str(item["type"]),
                str(item["msg"]),
            )
            for item in error.errors()
        )
        raise InvalidSpec("the job specification is not valid", problems=problems) from error
