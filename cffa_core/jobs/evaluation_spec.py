"""What an evaluation is asked for: which pairs, against which, by which features (METHODS 8)."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from cffa_core.jobs.spec_fields import BaseName, FolderName, Identifier, Kind, Seed, Spec


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
