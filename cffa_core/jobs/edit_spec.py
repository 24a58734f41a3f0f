"""What an edit is asked for: which changes by text, under which mask, of which pairs (METHODS 5)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from cffa_core.jobs.spec_fields import BaseName, Identifier, Kind, PairGrid, PairIndex, Prompt, Resolution, Seed, Spec

HERE = "{}"
Sentence = Annotated[str, StringConstraints(max_length=1000, pattern=r"^[^{}]*\{\}[^{}]*$")]


class EditTerm(Spec):
    """One change: what is added or removed, how strongly, where, and when (LEDITS++, Brack et al. 2024)."""

    text: Prompt = Field(description="What changes, as short as possible: `haemorrhages`.")
    fa_text: Prompt | None = Field(default=None, description="The same for the angiogram; null: as `text`.")
    direction: Literal["add", "remove"] = "add"
    strength: float = Field(default=5.0, gt=0, le=50, description="Weight of the edit guidance.")
    threshold: float = Field(default=0.9, ge=0, lt=1, description="Quantile above which a place belongs to the mask.")
    warmup: int = Field(default=0, ge=0, lt=1000, description="Steps before the edit begins.")
    cooldown: int | None = Field(default=None, ge=1, le=1000, description="Step at which the edit ends; null: never.")

    @model_validator(mode="after")
    def _begins_before_it_ends(self) -> Self:
        if self.cooldown is not None and self.cooldown <= self.warmup:
            raise ValueError("cooldown must be larger than warmup: the edit would have no step")
        return self


class EditSettings(PairGrid):
    """All settings of an edit, apart from which pairs are edited with which model."""

    part_size: int = Field(default=8, ge=1, le=1024)
    edits: tuple[EditTerm, ...] = Field(default=(), max_length=8, description="None of them: the pairs come back.")
    mask: Literal["cf", "fa", "intersection", "union"] = Field(
        default="union", description="The one mask of both images: that of the CF, of the FA, or both joined."
    )
    resolution: Resolution = 512
    # diffusers' leading spacing has no step between two timesteps from 500 steps on.
    steps: int = Field(default=50, ge=2, le=499)
    skip: float = Field(default=0.15, ge=0, lt=1, description="Part of the steps, the noisiest ones, left out.")
    source_guidance: float = Field(default=3.5, ge=0, le=30, description="Counts where a prompt below is given.")
    cf_prompt: str = Field(default="", max_length=1000, description="What the CF shows before the edit; may be empty.")
    fa_prompt: str = Field(default="", max_length=1000, description="What the FA shows before the edit; may be empty.")
    cf_sentence: Sentence = Field(
        default=HERE, description="Sentence around the text of an edit, which stands where `{}` is, for the CF."
    )
    fa_sentence: Sentence = Field(default=HERE, description="The same for the FA.")
    against: Literal["empty", "source"] = Field(
        default="empty", description="What an edit's sentence is compared with: no prompt, or the source's above."
    )
    noise: Literal["shared", "independent"] = Field(
        default="shared", description="Noise of the inversion: the same for both images, or their own."
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    seed: Seed = 42

    @model_validator(mode="after")
    def _the_source_has_prompts(self) -> Self:
        if self.against == "source" and not (self.cf_prompt and self.fa_prompt):
            raise ValueError("against = source compares with cf_prompt and fa_prompt; give both")
        return self

    @model_validator(mode="after")
    def _every_edit_has_a_step(self) -> Self:
        taken = self.steps - int(self.steps * self.skip)
        for edit in self.edits:
            if edit.warmup >= taken:
                raise ValueError(f"an edit begins at step {edit.warmup}, and there are {taken} after the skipped ones")
        return self


class EditSpec(EditSettings):
    """An edit job: settings, the pairs (of a data set or of a generation job) and the model, or a base alone."""

    kind: Literal[Kind.EDIT] = Kind.EDIT
    count: int = Field(default=0, ge=0, le=1_000_000, description="Number of pairs; filled in when it is posted.")
    model_id: Identifier | None = Field(default=None, description="A trained model; null: the base as it is.")
    base: BaseName = Field(default="tiny", description="Without a model: the base that edits.")
    dataset_id: Identifier | None = Field(default=None, description="Edit the pairs of this data set.")
    names: tuple[str, ...] | None = Field(
        default=None, min_length=1, max_length=100_000, description="Of the data set, these pairs; null: all."
    )
    area: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,32}$")] | None = Field(
        default=None,
        description="Of the data set, a mask that came with each pair, `masks/AREA/NAME.png`: all else stays.",
    )
    generation_job_id: Identifier | None = Field(default=None, description="Or: the pairs of this succeeded job.")
    pair_indices: tuple[PairIndex, ...] | None = Field(
        default=None, min_length=1, max_length=100_000, description="Of the job, these pairs; null: all."
    )

    @model_validator(mode="after")
    def _pairs_come_from_one_place(self) -> Self:
        if (self.dataset_id is None) == (self.generation_job_id is None):
            raise ValueError("name what is edited: dataset_id or generation_job_id, one of the two")
        if self.names is not None and self.dataset_id is None:
            raise ValueError("names belongs to dataset_id; the pairs of a job are named by pair_indices")
        if self.area is not None and self.dataset_id is None:
            raise ValueError("area belongs to dataset_id; the pairs of a job have no masks")
        if self.pair_indices is not None and self.generation_job_id is None:
            raise ValueError("pair_indices belongs to generation_job_id; the pairs of a data set have names")
        for chosen in (self.names, self.pair_indices):
            if chosen is not None and len(set(chosen)) != len(chosen):
                raise ValueError("name each pair once")
        return self

    def settings(self) -> EditSettings:
        """What a recipe needs of it: no ids."""
        return EditSettings.model_validate(self.model_dump(include=set(EditSettings.model_fields)))
