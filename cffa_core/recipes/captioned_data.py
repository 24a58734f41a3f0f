"""Pictures with captions as the captioned model reads them: one modality of a data set at 224 x 224, split by eye.

What a pair is was decided by ``ingest``, what a caption is by ``data.captions``; nothing here knows a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cffa_core.captioned.image_coder import SIDE
from cffa_core.captioned.vocabulary import Vocabulary
from cffa_core.data.captions import CAPTIONS, read_captions
from cffa_core.data.contracts import CheckedPair
from cffa_core.data.ingest import open_pairs
from cffa_core.data.pairs import Pair, PairSet, load_pairs, square
from cffa_core.errors import InvalidDataset, NotEnoughData, Problem


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures ``(N, 3, 224, 224)`` uint8 on the CPU (an FA's channel three times), their names, eyes and captions."""

    names: tuple[str, ...]
    eyes: tuple[str, ...]
    captions: tuple[str, ...]
    pixels: torch.Tensor

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class CaptionedData:
    """What a training has: pictures to learn and to validate on; digests of the data set and of the captions used."""

    train: CaptionedPictures
    held_out: CaptionedPictures
    digest: str
    captions_digest: str


def signed(pixels: torch.Tensor) -> torch.Tensor:
    """Bytes to float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1.0


def load_captioned_data(
    path: Path, modality: str, holdout: float, seed: int, on_progress: Callable[[int, int], None]
) -> CaptionedData:
    """Pairs of a data-set folder that have a caption for ``modality``; split as pair methods split theirs.

    Raises ``InvalidDataset`` for bad pairs or captions, ``NotEnoughData`` if fewer than two pictures to learn have one.
    """
    known = read_captions(path)
    pairs = load_pairs(path, SIDE, on_progress=on_progress)
    captions = {name: text for name, said in known.items() if (text := getattr(said, modality)) is not None}
    train, held_out = (_pictures(part, modality, captions) for part in pairs.for_training(holdout, seed))
    if len(train) < 2:
        raise NotEnoughData(
            f"{len(train)} of {len(pairs)} pairs are for training and have a caption of the {modality}; write more "
            f'into {CAPTIONS}, a line {{"name": ..., "{modality}": ...}} for each'
        )
    used = sorted(zip((*train.names, *held_out.names), (*train.captions, *held_out.captions), strict=True))
    text = "".join(f"{name}\0{caption}\n" for name, caption in used)
    return CaptionedData(train, held_out, pairs.digest, hashlib.sha256(text.encode()).hexdigest())


def check_lengths(data: CaptionedData, vocabulary: Vocabulary, max_tokens: int) -> None:
    """Raise ``InvalidDataset`` naming every picture whose caption is longer than the model can read."""
    problems = []
    names, captions = (*data.train.names, *data.held_out.names), (*data.train.captions, *data.held_out.captions)
    for name, caption in zip(names, captions, strict=True):
        if (length := vocabulary.length(caption)) > max_tokens:
            message = f"{length - 2} words and marks; at most {max_tokens - 2}: shorten it or raise sizes.max_tokens"
            problems.append(Problem(f"{CAPTIONS}#{name}", "text_too_long", message))
    if problems:
        raise InvalidDataset(
            f"{len(problems)} caption(s) are too long; {problems[0].pointer}: {problems[0].message}",
            problems=tuple(problems),
        )


def read_pictures(path: Path, modality: str, most: int) -> Iterator[tuple[CheckedPair, NDArray[np.uint8], int]]:
    """Pair, picture ``(224, 224, 3)`` and the number of pictures in all, of the first ``most`` pairs, one at a time."""
    _, checked, decoded = open_pairs(path)
    for pair, images in islice(decoded, most):
        sized = square(images, SIDE)
        fa = np.repeat(sized.fa[..., None], 3, axis=2)
        yield pair, sized.cf if modality == "cf" else fa, min(most, len(checked))


def _pictures(pairs: PairSet, modality: str, captions: dict[str, str]) -> CaptionedPictures:
    chosen = [pair for pair in pairs if pair.name in captions]
    pixels = [_bytes(pair, modality) for pair in chosen]
    return CaptionedPictures(
        tuple(pair.name for pair in chosen),
        tuple(pair.eye for pair in chosen),
        tuple(captions[pair.name] for pair in chosen),
        torch.stack(pixels) if pixels else torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8),
    )


def _bytes(pair: Pair, modality: str) -> torch.Tensor:
    image = pair.cf if modality == "cf" else pair.fa.expand(3, -1, -1)
    return ((image + 1) * 127.5).round().to(torch.uint8)
