"""What an export is asked for: which pairs of a job, in which form."""

from __future__ import annotations

from functools import cached_property
from typing import Literal, Self

from pydantic import Field, model_validator

from cffa_core.jobs.spec_fields import Identifier, Kind, PairIndex, Spec

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
