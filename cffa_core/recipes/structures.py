"""Where the structures of a generation come from: the pairs of a data set, or procedural eyes (METHODS 3, controlnet).

Structure i depends on (settings, data set, i) alone, not on which part asks for it. What a structure is, is the model's
own business; which pair was drawn on which is told to the archive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cffa_core.data.contracts import CheckedPair, PairImages
from cffa_core.data.pairs import Pair, load_pairs, to_pair
from cffa_core.data.phantom import make_phantom
from cffa_core.errors import InvalidSpec, Problem
from cffa_core.jobs.spec import GenerateSettings, check_structures
from cffa_core.methods.controlnet import ControlNet
from cffa_core.methods.method import PairMethod, Tensors
from cffa_core.rng import derive_seed


@dataclass(frozen=True)
class Structure:
    """Control images by name, ``(3, H, W)`` uint8, and ``source``, which names whose they are."""

    images: Tensors
    source: dict[str, Any]


class Structures(Protocol):
    """The structures of a generation, by index of the pair."""

    def of(self, index: int) -> Structure: ...


class DatasetStructures:
    """Pair i is drawn on the structure of pair ``i modulo n`` of a data set, as the model saw its training pairs'."""

    def __init__(self, model: PairMethod, pairs: Sequence[Pair]) -> None:
        self._model = model
        self._pairs = pairs

    def of(self, index: int) -> Structure:
        """Raises ``InvalidDataset`` if the model was trained on vessel masks and the pair has none."""
        pair = self._pairs[index % len(self._pairs)]
        return Structure(self._model.structure(pair), {"pair": pair.name})


class ProceduralStructures:
    """Pair i is drawn on procedural eye i of the job: its exact vessels, and tiles of its images."""

    def __init__(self, model: ControlNet, seed: int, resolution: int) -> None:
        self._model = model
        self._seed = seed
        self._resolution = resolution

    def of(self, index: int) -> Structure:
        """The same eye for the same seed of the job, whatever the grid."""
        seed = derive_seed(self._seed, "structure", index)
        eye = make_phantom(seed, self._resolution)
        checked = CheckedPair(eye.name, eye.name, self._resolution, self._resolution, "given", None, ("vessel",))
        images = PairImages(eye.cf, eye.fa, eye.valid_cf, eye.valid_fa, {"vessel": eye.masks["vessel"]})
        shown = self._model.structure_from(to_pair(checked, images, self._resolution), "masks")
        return Structure(shown, {"procedural_seed": seed})


def structures_for(
    settings: GenerateSettings, model: PairMethod, dataset: Path | Sequence[Pair] | None = None
) -> Structures | None:
    """The structures that ``settings`` asks for, or None for a model that takes none.

    ``dataset`` is what ``structures = "dataset"`` stands for: a checked folder, a raw folder or zip, or pairs. Raises
    ``InvalidSpec`` (pointer ``/structures``) if model and settings do not fit, if the data set is not there or its
    pairs are of another resolution; ``InvalidDataset`` for a bad one.
    """
    check_structures(model.method, settings.structures)
    if not isinstance(model, ControlNet):
        return None
    if settings.structures == "procedural":
        return ProceduralStructures(model, settings.seed, settings.resolution)
    if dataset is None:
        raise _misfit('structures = "dataset" needs the data set whose vessels are to be drawn')
    if isinstance(dataset, Path):
        return DatasetStructures(model, load_pairs(dataset, settings.resolution, model.settings.crop_to_common))
    if not dataset or dataset[0].cf.shape[-1] != settings.resolution:
        raise _misfit(f"the pairs of the structures must be loaded at {settings.resolution} pixels")
    return DatasetStructures(model, dataset)


def _misfit(message: str) -> InvalidSpec:
    return InvalidSpec(message, problems=(Problem("/structures", "structures", message),))
