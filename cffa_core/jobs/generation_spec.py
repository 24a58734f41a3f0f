"""What a generation is asked for: how many pairs, drawn how, let through by which gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from cffa_core.jobs.spec_fields import (
    MAX_TRIES,
    Identifier,
    Kind,
    PairGrid,
    PairTry,
    Resolution,
    SamplerSpec,
    Seed,
    Sha256,
    Spec,
    TokenName,
)


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


class GenerateSettings(PairGrid):
    """All settings of a generation run, apart from which model it uses.

    The job is a fixed grid: part ``p`` holds the pairs ``p * part_size ... min(count, (p+1) * part_size) - 1``, and
    inside a part every forward has exactly ``batch_size`` rows (the last batch is padded), so that a pair does not
    depend on its neighbours (DESIGN, Generation).
    """

    resolution: Resolution = 512
    batch_size: int = Field(default=4, ge=1, le=64)
    sampler: SamplerSpec = SamplerSpec()
    structures: Literal["dataset", "procedural"] | None = Field(
        default=None, description="Whose vessels a model of method controlnet draws: a data set's, or procedural eyes'."
    )
    tokens: tuple[TokenName, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="Of a model trained with tokens, those that are drawn; null: all of them.",
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
    def _names_each_token_once(self) -> Self:
        if self.tokens is not None and len(set(self.tokens)) != len(self.tokens):
            raise ValueError("tokens names each token once")
        return self

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
