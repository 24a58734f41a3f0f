"""Types that several job specifications share: ids, names, ranges, the lists of methods, kinds and samplers.

The specifications themselves are beside this file, ``spec`` holds their union.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from cffa_core.errors import InvalidSpec, Problem

SPEC_VERSION = 4

CF_PROMPT = "A high quality color fundus photograph, retinal structure"
FA_PROMPT = "A high quality fluorescein angiography image, bright retinal vessels"

Identifier = Annotated[str, StringConstraints(pattern=r"^[a-z]+_[0-9a-z]{20}$")]
FolderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
BaseName = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$", max_length=200)
]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
TokenName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")]
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
    ATTENTION = "attention"
    EDIT = "edit"
    CAPTIONED_TRAINING = "captioned_training"
    CAPTIONED = "captioned"


TRAININGS = (Kind.TRAINING, Kind.CAPTIONED_TRAINING)
"""Kinds whose product is a model, and whose only working unit counts the steps of the spec."""
REPORTS = (Kind.EVALUATION, Kind.ATTENTION, Kind.CAPTIONED)
"""Kinds whose product is a report with its files."""


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


class PairGrid(Spec):
    """The fixed grid of a job that makes pairs: part ``p`` holds ``part_size`` of them, the last may have fewer.

    What is in a part depends on the specification alone, never on which worker makes it, how often, or when.
    """

    count: int = Field(ge=1, le=1_000_000, description="Number of pairs N.")
    part_size: int = Field(default=32, ge=1, le=1024)

    @property
    def indices(self) -> Sequence[int]:
        """Indices of all pairs that are asked for, rising."""
        return range(self.count)

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


def check_structures(method: Method, structures: str | None) -> None:
    """Raise ``InvalidSpec`` (pointer ``/structures``) if a model of ``method`` cannot be drawn from with them."""
    if (method in ON_STRUCTURES) == (structures is not None):
        return
    if structures is None:
        message = f"a model of method {method} draws on structures; say which: procedural, or a data set's"
    else:
        message = f"a model of method {method} takes no structures; leave structures out"
    raise InvalidSpec(message, problems=(Problem("/structures", "structures", message),))


def check_tokens(known: Sequence[str], asked: Sequence[str] | None) -> None:
    """Raise ``InvalidSpec`` (pointer ``/tokens``) if a model that has the tokens ``known`` is asked for others."""
    unknown = [name for name in asked or () if name not in known]
    if not unknown:
        return
    there = f"it has {', '.join(known)}" if known else "it was trained without tokens; leave tokens out"
    message = f"the model does not know the tokens {', '.join(unknown)}; {there}"
    raise InvalidSpec(message, problems=(Problem("/tokens", "unknown_token", message),))
