"""Memorisation of PAIRS: is a generated pair nearer to a training pair than real, unseen pairs are? (METHODS 8)

Pairs are compared as small high-passed pictures of both modalities at once, over all eight flips and rotations and
shifts of up to 9 % of the side, the same for CF and FA; so a copy is found however it was turned. Distances are
one minus the mean of the two normalised cross-correlations. Files and pictures for people are not made here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from scipy import fft

from cffa_core.data.contracts import Bytes, Mask, PairImages
from cffa_core.data.ridges import interior
from cffa_core.evaluation.bootstrap import Score, Whose, estimate

SIDE = 64
MAX_SHIFT = 6  # cells of 64: 9 % of the side
HIGH_PASS_SIGMA = 4.0  # cells; illumination is smooth and says nothing about who it is
PERCENTILE = 5.0
MIN_HELD_OUT = 20  # a 5th percentile of fewer is a guess
MIN_GENERATED = 10
MIN_TRAIN = 20
MIN_ENERGY = 1.0  # grey levels; less than a sixtieth of one per cell is rounding
COPY = 0.02  # a held-out pair this near to a training pair is no held-out pair

Thumbnails = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Match:
    """The nearest other pair: its ``index``, the ``distance`` in [0, 2], and how it was turned and moved to be so near.

    ``turn`` is one of the eight of :func:`turned`, applied to the query; ``shift`` (rows, columns) as a fraction of the
    side, by which the turned query is moved.
    """

    index: int
    distance: float
    turn: int
    shift: tuple[float, float]


@dataclass(frozen=True)
class Memorisation:
    """Nearest training pair of each generated pair and of each held-out real pair, and what follows from them.

    ``threshold`` is the 5th percentile of the held-out distances; nearer pairs are ``flagged``. ``copies`` held-out
    pairs were left out of it, because they are in the training set themselves.
    """

    generated: tuple[Match, ...]
    held_out: tuple[Match, ...]
    threshold: float | None
    flagged: tuple[bool, ...]
    flagged_share: Score
    auth_pct: Score
    copies: int


def thumbnail(images: PairImages) -> Thumbnails:
    """A pair as ``(2, 64, 64)``: CF's green channel and FA, high-passed, 0 where not seen, each of energy 1/2."""
    planes = [_plane(np.ascontiguousarray(images.cf[..., 1]), images.valid_cf), _plane(images.fa, images.valid_fa)]
    return np.stack(planes)


def _plane(grey: Bytes, valid: Mask) -> Thumbnails:
    height, width = grey.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    edges = (top, side - height - top, left, side - width - left)
    inside = interior(valid).astype(np.float32)
    seen, picture = (
        cv2.copyMakeBorder(plane, *edges, cv2.BORDER_CONSTANT, value=0) for plane in (inside, inside * grey)
    )
    weight, summed = (cv2.resize(plane, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for plane in (seen, picture))
    # Means over what was seen alone: the aperture's shape must not look like an eye.
    around = cv2.GaussianBlur(summed, (0, 0), HIGH_PASS_SIGMA) / np.maximum(
        cv2.GaussianBlur(weight, (0, 0), HIGH_PASS_SIGMA), 1e-3
    )
    detail = summed - around * weight
    energy = float(np.sqrt((detail**2).sum()))
    # A plane without any detail is like nothing, and unlike nothing: its correlations are 0.
    unit = detail * (np.sqrt(0.5) / energy) if energy > MIN_ENERGY else np.zeros_like(detail)
    return np.asarray(unit, dtype=np.float32)


def turned(picture: npt.NDArray[np.generic], turn: int) -> npt.NDArray[np.generic]:
    """One of the eight flips and rotations of the last two axes: ``turn % 4`` quarter turns, mirrored from 4 on."""
    mirrored = picture[..., ::-1] if turn >= 4 else picture
    return np.rot90(mirrored, turn % 4, axes=(-2, -1))


def nearest(
    queries: Thumbnails,
    others: Thumbnails,
    *,
    own: Sequence[int | None] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Match]:
    """Nearest of ``others`` (T, 2, 64, 64) for each of ``queries`` (Q, 2, 64, 64), by FFT over all turns and shifts.

    ``own[q]`` is the index in ``others`` that query q may not match: itself. About 30 microseconds per pair and turn.
    """
    spectra = np.conj(fft.rfft2(others))
    reach = np.arange(-MAX_SHIFT, MAX_SHIFT + 1)
    found = []
    for number, query in enumerate(queries):
        best = Match(-1, np.inf, 0, (0.0, 0.0))
        for turn in range(8):
            product = (fft.rfft2(turned(query, turn).astype(np.float32)) * spectra).sum(axis=1)
            near = fft.irfft2(product, s=(SIDE, SIDE))[:, reach[:, None], reach[None, :]].reshape(len(others), -1)
            if own is not None and own[number] is not None:
                near[own[number]] = -np.inf
            index, place = np.unravel_index(int(near.argmax()), near.shape)
            distance = 1.0 - float(near[index, place])
            if distance < best.distance:
                rows, columns = divmod(int(place), len(reach))
                # Correlation at +d: the query moved by -d lies on the other.
                shift = (-float(reach[rows]) / SIDE, -float(reach[columns]) / SIDE)
                best = Match(int(index), distance, turn, shift)
        found.append(best)
        if on_progress is not None:
            on_progress(number + 1)
    return found


def memorisation(
    generated: Thumbnails,
    eyes: Whose,
    held_out: Thumbnails,
    train: Thumbnails,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Memorisation:
    """Compare generated (N, 2, 64, 64) and held-out pairs with the training pairs (T, 2, 64, 64).

    ``eyes`` are those of the generated pairs. A flagged pair is nearer to a training pair than 95 % of the held-out
    ones are; about 5 % of honest pairs are flagged.
    """
    total = len(generated) + len(held_out)

    def told(before: int) -> Callable[[int], None]:
        return lambda done: on_progress(before + done, total) if on_progress is not None else None

    ours = nearest(generated, train, on_progress=told(0))
    real = nearest(held_out, train, on_progress=told(len(generated)))
    distances = np.array([match.distance for match in real])
    unseen = distances[distances >= COPY]
    threshold, reason = _threshold(unseen, len(distances) - len(unseen))
    if reason is None and len(generated) < MIN_GENERATED:
        reason = f"{len(generated)} pairs; {MIN_GENERATED} are needed"
    flags = tuple(threshold is not None and match.distance < threshold for match in ours)
    detail: dict[str, float] = {"n_train": len(train), "n_held_out": len(unseen)}
    if reason is not None:
        share = Score(len(generated), refused=reason, detail=detail)
    else:
        found = estimate(np.array(flags, dtype=np.float64), eyes, seed=seed, label="flagged")
        share = Score(len(generated), found, detail=detail)
    authentic = auth_pct(ours, train, eyes, seed=seed)
    return Memorisation(tuple(ours), tuple(real), threshold, flags, share, authentic, len(distances) - len(unseen))


def _threshold(unseen: npt.NDArray[np.float64], copies: int) -> tuple[float | None, str | None]:
    if len(unseen) < MIN_HELD_OUT:
        also = f" ({copies} reference pairs are training pairs and do not count)" if copies else ""
        return None, f"{len(unseen)} held-out reference pairs{also}; {MIN_HELD_OUT} are needed for a baseline"
    return float(np.percentile(unseen, PERCENTILE)), None


def auth_pct(matches: Sequence[Match], train: Thumbnails, eyes: Whose, *, seed: int = 0) -> Score:
    """Share of authentic pairs, in percent (Alaa et al. 2022, section 4.3).

    A pair is authentic unless it is nearer to its nearest training pair than that one is to any other training pair.
    """
    detail = {"n_train": float(len(train))}
    if len(matches) < MIN_GENERATED or len(train) < MIN_TRAIN:
        reason = f"{len(matches)} pairs, {len(train)} training pairs; {MIN_GENERATED} and {MIN_TRAIN} are needed"
        return Score(len(matches), refused=reason, detail=detail)
    hit = sorted({match.index for match in matches})
    around = dict(zip(hit, nearest(train[hit], train, own=hit), strict=True))
    authentic = np.array([100.0 * (match.distance >= around[match.index].distance) for match in matches])
    return Score(len(matches), estimate(authentic, eyes, seed=seed, label="authentic"), detail=detail)
