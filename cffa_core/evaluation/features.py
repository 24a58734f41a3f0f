"""Features of whole sets of pairs, and the spaces in which fidelity and diversity are measured: CF, FA and joint.

An extractor has a name and a digest; features of two extractors are never compared. How an extractor sees an image is
said in ``filter_bank`` and ``vision_transformer``; what is computed from features, in ``fidelity`` and ``diversity``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cffa_core.data.contracts import PairImages
from cffa_core.errors import InvalidSpec, NotEnoughData, Problem
from cffa_core.evaluation.bootstrap import Eyes, Values, Whose
from cffa_core.evaluation.filter_bank import FilterBank

DEFAULT = "filters"
EXTRACTORS = (DEFAULT, "vit")
SPACES = ("cf", "fa", "joint")
SPREADS = 2.0


class Extractor(Protocol):
    """Turns a pair into two vectors; the same name and digest mean the same numbers."""

    @property
    def name(self) -> str:
        """Name for people."""

    @property
    def sha256(self) -> str:
        """Digest (hex) of what defines it: its weights, or its source."""

    def pair(self, images: PairImages) -> tuple[Values, Values]:
        """Features (D_cf,) of CF and (D_fa,) of FA."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of N pairs: ``cf`` (N, D_cf), ``fa`` (N, D_fa), and whose each pair is."""

    extractor: str
    sha256: str
    eyes: Whose
    cf: Values
    fa: Values


class Collector:
    """Collects the features of pairs as they come by; ``patients`` are the known ones of their eyes."""

    def __init__(self, extractor: Extractor, patients: Mapping[str, str] | None = None) -> None:
        self.extractor = extractor
        self._patients = patients or {}
        self._eyes: list[str] = []
        self._found: list[tuple[Values, Values]] = []

    def add(self, eye: str, images: PairImages) -> None:
        """Take the features of one pair."""
        self._found.append(self.extractor.pair(images))
        self._eyes.append(eye)

    def result(self) -> FeatureSet:
        """All features so far. Raises ``NotEnoughData`` if there are none."""
        if not self._found:
            raise NotEnoughData("no pair was seen, so there are no features to compare")
        cf, fa = (np.stack([found[side] for found in self._found]) for side in (0, 1))
        eyes = Eyes(tuple(self._eyes), self._patients)
        return FeatureSet(self.extractor.name, self.extractor.sha256, eyes, cf, fa)


def load_extractor(name: str, *, folder: Path | None = None, device: str = "cpu") -> Extractor:
    """``filters`` (needs nothing), or ``vit``: a vision transformer such as DINOv2 or RETFound in a local ``folder``.

    Raises ``InvalidSpec`` for another name or a missing folder argument, ``ModelUnavailable`` for a folder that does
    not hold a usable model.
    """
    if name == DEFAULT:
        if folder is not None:
            message = "extractor `filters` has no weights; give --extractor vit with the folder of a vision transformer"
            raise InvalidSpec(message, problems=(Problem("/extractor_folder", "unexpected", message),))
        return FilterBank()
    if name != "vit":
        message = f"unknown feature extractor {name!r}; choose one of {', '.join(EXTRACTORS)}"
        raise InvalidSpec(message, problems=(Problem("/extractor", "unknown_extractor", message),))
    if folder is None:
        message = (
            "extractor `vit` needs the local folder of a vision transformer (DINOv2, RETFound; nothing is downloaded)"
        )
        raise InvalidSpec(message, problems=(Problem("/extractor_folder", "missing", message),))
    from cffa_core.evaluation.vision_transformer import VisionTransformer

    return VisionTransformer(folder, device=device)


OnMeasure = Callable[[int, int], None]
"""Told how many measures are done, of how many: counting features takes seconds to minutes."""


def spaces(generated: FeatureSet, reference: FeatureSet) -> dict[str, tuple[Values, Values]]:
    """Per space the features of both sets, centred and scaled by the reference.

    Each modality is moved by the reference's mean and divided by ONE number, twice the root mean square distance of the
    reference's features from it per dimension: the polynomial kernel and the cosine have an origin, and in the joint
    space neither modality may outweigh the other; relative spreads of single features stay those of the extractor.
    Twice, because at once the cubic term follows a few outliers (docs/evaluation.md).
    Raises ``InvalidSpec`` if the sets come from two extractors.
    """
    if (generated.extractor, generated.sha256) != (reference.extractor, reference.sha256):
        raise InvalidSpec(
            f"features of {generated.extractor} ({generated.sha256[:12]}) and of {reference.extractor} "
            f"({reference.sha256[:12]}) cannot be compared; extract both sets with one extractor"
        )
    cf, fa = _scaled(generated.cf, reference.cf), _scaled(generated.fa, reference.fa)
    joint = (np.hstack([cf[0], fa[0]]), np.hstack([cf[1], fa[1]]))
    return {"cf": cf, "fa": fa, "joint": joint}


def _scaled(generated: Values, reference: Values) -> tuple[Values, Values]:
    centre = reference.mean(axis=0)
    spread = float(np.sqrt(((reference - centre) ** 2).mean()))
    size = SPREADS * spread if spread > 1e-9 else 1.0  # a reference of copies has no spread of its own
    return (generated - centre) / size, (reference - centre) / size
