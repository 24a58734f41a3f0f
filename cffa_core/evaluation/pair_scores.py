"""Scores of single generated pairs: does CF fit FA, and is the pair a training pair over again?

The same measures as of whole sets (``scores``, ``memorisation``), taken pair by pair while pairs are drawn. What is
done with them (gates, manifests) is decided elsewhere. Torch-free; the pictures are plain arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cffa_core.data.contracts import Bytes, PairImages
from cffa_core.data.field_of_view import field_of_view
from cffa_core.errors import CorruptArtifact
from cffa_core.evaluation.memorisation import SIDE, Thumbnails, nearest, thumbnail
from cffa_core.evaluation.scores import compare, pair_features

ALIGNMENT = "ridge_correlation"  # the score of `scores` that keeps true and shuffled real pairs furthest apart
NOVELTY_FORMAT = "cffa-novelty/1"
DIGITS = 4  # what is recorded is what was decided on


@dataclass(frozen=True)
class PairScores:
    """``alignment`` holds the scores of `scores.SCORES` by name (None: too little is seen in common to say).

    ``novelty`` holds ``similarity`` to the nearest training pair, 0..1, and its name, ``nearest``; None where the
    training pairs are not known.
    """

    alignment: dict[str, float] | None
    novelty: dict[str, Any] | None


class TrainingPairs:
    """What novelty is measured against: names and thumbnails ``(T, 2, 64, 64)`` of the pairs a model has learnt from.

    They are small pictures of patients: they are kept with the training and never with the model.
    """

    def __init__(self, names: Sequence[str], thumbnails: Thumbnails, dataset_digest: str) -> None:
        if thumbnails.shape != (len(names), 2, SIDE, SIDE) or not names:
            raise ValueError(f"{len(names)} names and thumbnails of shape {thumbnails.shape} do not belong together")
        self.names = tuple(names)
        self.thumbnails = thumbnails.astype(np.float32)
        self.dataset_digest = dataset_digest

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, PairImages]], dataset_digest: str) -> Self:
        """Thumbnails of (name, images); images may come one at a time."""
        names, found = [], []
        for name, images in pairs:
            names.append(name)
            found.append(thumbnail(images))
        # As they will be read: a run that goes on must not score otherwise than one that begins anew.
        return cls(names, np.stack(found).astype(np.float16), dataset_digest)

    def write(self, path: Path) -> None:
        """Write ``novelty.safetensors``: half precision, 16 KB a pair; the same pairs give the same bytes."""
        said = {"format": NOVELTY_FORMAT, "dataset_digest": self.dataset_digest, "names": list(self.names)}
        # One entry: the library does not keep the order of several.
        metadata = {"cffa": json.dumps(said, sort_keys=True)}
        path.write_bytes(save({"thumbnails": self.thumbnails.astype(np.float16)}, metadata=metadata))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Inverse of :meth:`write`; raises ``CorruptArtifact`` for any other file."""
        try:
            with safe_open(path, framework="np") as file:
                said = json.loads((file.metadata() or {})["cffa"])
                if said["format"] != NOVELTY_FORMAT:
                    raise CorruptArtifact(f"{path.name} is {said['format']!r}, not {NOVELTY_FORMAT}; train again")
                return cls(said["names"], file.get_tensor("thumbnails"), said["dataset_digest"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise CorruptArtifact(f"{path.name} is not readable: {error}; fetch it again, or train again") from error

    def novelty(self, thumbnails: Thumbnails) -> list[dict[str, Any]]:
        """Of each of (Q, 2, 64, 64): ``similarity`` to the nearest training pair and its name, ``nearest``.

        Similarity is 1 minus the distance of `memorisation.nearest`, at least 0: the mean of the two normalised
        cross-correlations, CF with CF and FA with FA, at the best of all turns and shifts. A copy has 1.
        """
        return [
            {"similarity": round(min(1.0, max(0.0, 1.0 - match.distance)), DIGITS), "nearest": self.names[match.index]}
            for match in nearest(thumbnails, self.thumbnails)
        ]


def score_pairs(pairs: Sequence[tuple[Bytes, Bytes]], training: TrainingPairs | None = None) -> list[PairScores]:
    """Scores of pairs of CF (H, W, 3) and FA (H, W), each as if it had been read from a data set.

    About a third of a second of one core per pair of 512 pixels, most of it for the ridges.
    """
    seen = [PairImages(cf, fa, field_of_view(cf), field_of_view(fa)) for cf, fa in pairs]
    novelty: Sequence[dict[str, Any] | None] = [None] * len(seen)
    if training is not None and seen:
        novelty = training.novelty(np.stack([thumbnail(images) for images in seen]))
    return [PairScores(alignment(images), found) for images, found in zip(seen, novelty, strict=True)]


def alignment(images: PairImages) -> dict[str, float] | None:
    """The scores of `scores.compare`, as an evaluation of the same files would give them; None where it gives none."""
    found = compare(*pair_features(images))
    return None if found is None else {name: round(value, DIGITS) for name, value in found.items()}
