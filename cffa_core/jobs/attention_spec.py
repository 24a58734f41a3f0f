"""What an attention job is asked for: which maps of which sampling run are kept (METHODS 4)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from cffa_core.jobs.spec_fields import Identifier, Kind, PairIndex, Resolution, SamplerSpec, Seed, Spec

# Steps times cells that each_step may keep of every layer and word: 400 steps at 16, 25 at 64.
MOST_CELLS = 400 * 16**2

Word = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class AttentionSettings(Spec):
    """Which attention maps of one pair's sampling are kept, apart from which model draws it.

    The pair is pair ``index`` of a generation with this seed, sampler, resolution and a batch of one.
    """

    resolution: Resolution = 512
    sampler: SamplerSpec = SamplerSpec()
    seed: Seed = 42
    index: PairIndex = 0
    kinds: tuple[Literal["cross", "self"], ...] = Field(
        default=("cross",), description="cross: where each word looks; self: where the points look."
    )
    places: tuple[Literal["down", "mid", "up"], ...] = Field(default=("down", "up"), description="Parts of the UNet.")
    map_resolution: int = Field(default=16, ge=4, le=128, description="Side to which maps are brought and averaged.")
    steps: tuple[Annotated[int, Field(ge=0, lt=1000)], ...] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="Steps of the sampler, from 0, that are kept; null: all.",
    )
    tokens: tuple[Word, ...] | None = Field(
        default=None, min_length=1, max_length=77, description="Words of the prompts that are shown; null: every one."
    )
    points: tuple[tuple[Fraction, Fraction], ...] = Field(
        default=((0.5, 0.5),),
        min_length=1,
        max_length=64,
        description="With kind self: points (x, y) as fractions of the image.",
    )
    each_step: bool = Field(default=False, description="Keep the maps of every kept step by themselves too.")
    each_layer: bool = Field(default=False, description="Keep the maps of every layer by themselves too.")
    structures: Literal["procedural"] | None = Field(
        default=None, description="What a model of method controlnet draws on; no other method takes any."
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        for name in ("kinds", "places", "steps", "tokens"):
            given = getattr(self, name)
            if given is not None and (not given or len(set(given)) != len(given)):
                raise ValueError(f"{name} must name at least one, each once")
        if self.steps is not None and max(self.steps) >= self.sampler.steps:
            raise ValueError(f"steps are counted from 0, and the sampler takes {self.sampler.steps}")
        return self

    @model_validator(mode="after")
    def _single_steps_are_few(self) -> Self:
        kept = self.sampler.steps if self.steps is None else len(self.steps)
        if self.each_step and kept * self.map_resolution**2 > MOST_CELLS:
            most = MOST_CELLS // self.map_resolution**2
            raise ValueError(f"each_step keeps at most {most} steps at this map_resolution, not {kept}; name the steps")
        return self


class AttentionSpec(AttentionSettings):
    """An attention job: settings plus the model whose sampling is looked into."""

    kind: Literal[Kind.ATTENTION] = Kind.ATTENTION
    model_id: Identifier

    def settings(self) -> AttentionSettings:
        """What a recipe needs of it: no ids."""
        return AttentionSettings.model_validate(self.model_dump(include=set(AttentionSettings.model_fields)))
