"""What the API says about drawn pairs: those of the archive, those that a gate refused, and the slots left empty."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from services.api.schemas import JOB

Scores = dict[str, float] | None


class StoredImage(BaseModel):
    """One PNG of a made pair."""

    name: str = Field(examples=["cf/000017.png"])
    size: int
    sha256: str
    url: str = Field(examples=[f"/v1/jobs/{JOB}/pairs/17/cf.png"])


class Novelty(BaseModel):
    """The training pair that a made pair is most like: a copy has similarity 1."""

    similarity: float = Field(ge=0, le=1)
    nearest: str = Field(description="Name of the training pair.")


class Scored(BaseModel):
    """What is known of a pair however it was judged. Archives of older versions have no try and no scores."""

    model_config = ConfigDict(populate_by_name=True)
    index: int
    part: int
    seed: int
    attempt: int = Field(alias="try", description="Which try at the slot this pair is; 0 without a gate.")
    alignment: Scores = Field(description="Scores of CF against FA by name; null if too little is seen in common.")
    novelty: Novelty | None = Field(description="Null where the training pairs are not known.")


class PairView(Scored):
    """One made pair: its seed, its scores and its two images; of an edited pair what it was, and what changed."""

    cf: StoredImage
    fa: StoredImage
    fa_chroma: float | None = Field(description="Mean |a*|, |b*| of FA before it became one channel.")
    source: dict[str, Any] | None = Field(
        default=None, description="Edited pairs: what was edited: digest of its set, name or index, digests of files."
    )
    alignment_before: Scores = Field(default=None, description="Edited pairs: the scores before the edit.")
    mask_share: float | None = Field(default=None, description="Edited pairs: share of the image in the mask, 0 to 1.")
    mask: StoredImage | None = Field(default=None, description="Edited pairs: white where the edit acted.")
    sheet: StoredImage | None = Field(default=None, description="Edited pairs: before and after, side by side.")


class PairList(BaseModel):
    """One page of the pairs that are finished, in index order; more appear while the job runs."""

    items: list[PairView]
    next_page_token: str | None


class RejectView(Scored):
    """One pair that the gate refused. Its images are in the part's archive of refused pairs."""

    reasons: list[str] = Field(description="too_little_aligned, too_similar_to_training, not_scored")


class RejectList(BaseModel):
    """One page of refused pairs, by index and try."""

    items: list[RejectView]
    next_page_token: str | None


class ExhaustedView(BaseModel):
    """A slot that stayed empty: no try passed the gate."""

    index: int
    part: int
    tries: int
    best_alignment: float | None
    least_similarity: float | None


class ExhaustedList(BaseModel):
    """One page of empty slots, by index."""

    items: list[ExhaustedView]
    next_page_token: str | None


def scored(part: int, raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of :class:`Scored` from an entry of a ``part.json`` or ``rejects.json``."""
    return {
        "index": raw["index"],
        "part": part,
        "seed": raw["seed"],
        "try": raw.get("try", 0),
        "alignment": raw.get("alignment"),
        "novelty": raw.get("novelty"),
    }


def edited(raw: dict[str, Any]) -> dict[str, Any]:
    """What an entry of a ``part.json`` says of an edit; nothing for a generated pair."""
    return {name: raw[name] for name in ("source", "alignment_before", "mask_share") if name in raw}
