"""What is in the pairs of a data set: misregistration, vessel overlap, valid regions, duplicates, leaks of a split.

Looks at pairs that the check took in already; all of it is advice, nothing is refused here. Torch-free, one pair in
memory at a time. How the findings are shown to people is in ``survey_sheet``.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from scipy import fft

from cffa_core.data.contracts import Bytes, CheckedPair, Mask, PairImages
from cffa_core.data.ridges import Map, filled, interior, ridge_map, vessels
from cffa_core.evaluation.memorisation import SIDE, Thumbnails, thumbnail, turned
from cffa_core.evaluation.scores import MIN_COMMON, correlation, dice, shift

FORMAT = "cffa-survey/1"
WORKING_SIDE = 512  # larger pairs are looked at in this size: the time per pair is bounded
MAX_SHIFT_PX = 3.0  # of an image of 512 pixels a side
UNRELATED = 0.12  # ridge correlation after the best shift: 0.56 in the mean of real pairs, 0.00 of shuffled ones
LITTLE_SEEN = 0.2
NEAR = 0.25  # distance of two pairs as small pictures: one is the other, perhaps turned, scaled in value, saved as JPEG
SAME_EYE = 0.5  # of 26 real pairs, those of one eye: 0.10 to 0.41; those of different eyes: 0.61 and more
SHIFTS = 3  # cells of 32 by which one may be moved
MOST_SHIFTED = 1500  # of more pairs only pictures that were not moved are found
LIKENESS_FLAGS = {"exact": "duplicate", "near": "near_duplicate", "same_eye": "likely_same_eye"}
LATERALITY = re.compile(r"[-_. ]*(?:\b|(?<=[-_. \d]))(?:od|os|ou|left|right|l|r)$", re.IGNORECASE)


@dataclass(frozen=True)
class PairFindings:
    """What was found in one pair. Shares are of the image's area; ``shift_px`` is in its own pixels.

    ``patient`` is a guess by the eye's name where it is not known.
    ``shift_px``, ``vessel_dice`` and ``ridge_correlation`` are None where CF and FA saw too little in common.
    """

    name: str
    eye: str
    patient: str
    width: int
    height: int
    shift_px: float | None
    vessel_dice: float | None
    ridge_correlation: float | None
    valid_cf: float
    valid_fa: float
    common: float
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Likeness:
    """Two pairs that are one: ``exact`` (the same pixels), ``near``, or only ``same_cf`` or ``same_fa``; or that show
    one eye although their eyes have different names (``same_eye``).

    ``turn`` (0..7, those of ``memorisation.turned``) and ``distance`` say how near ones were found.
    """

    first: str
    second: str
    kind: str
    distance: float
    turn: int
    same_eye: bool


def survey(
    pairs: Iterable[tuple[CheckedPair, PairImages]],
    *,
    notes: Mapping[str, Collection[str]] | None = None,
    split: Mapping[str, Collection[str]] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Look at every pair; the findings JSON-ready. About a quarter of a second per pair on one core.

    ``notes`` are codes that the check found (``grey_cf``, ``colour_fa``) by name of pair, ``split`` the names of each
    part. Flags of a pair: ``misregistered`` (more than 3 px), ``unrelated`` (the vessels do not agree wherever the FA
    is moved), ``no_overlap``, ``little_seen``, ``grey_cf``, ``colour_fa``, ``duplicate``, ``near_duplicate``,
    ``likely_same_eye``, ``leak``.
    """
    notes = notes or {}
    found: list[PairFindings] = []
    pictures: list[Thumbnails] = []
    digests: list[tuple[str, str]] = []
    for pair, images in pairs:
        found.append(_look(pair, images, notes.get(pair.name, ())))
        pictures.append(thumbnail(images))
        digests.append((_digest(images.cf), _digest(images.fa)))
        if on_progress is not None:
            on_progress(len(found))
    alike = _exact(found, digests)
    known = {(like.first, like.second): like.kind for like in alike}
    for like in _near(found, pictures):
        kind = known.get((like.first, like.second))
        if kind is None or (like.kind == "near" and kind != "exact"):
            alike.append(like)
    leaks = _leaks(found, alike, split or {})
    return _report(found, alike, leaks)


def patient_of(eye: str) -> str:
    """Patient of an eye by its name: without a side (OD, OS, L, R, left, right) at its end."""
    return LATERALITY.sub("", eye) or eye


def _look(pair: CheckedPair, images: PairImages, notes: Collection[str]) -> PairFindings:
    cf, fa, valid_cf, valid_fa, scale = _sized(images)
    common_field = interior(valid_cf) & interior(valid_fa)
    flags = [note for note in ("grey_cf", "colour_fa") if note in notes]
    moved: float | None = None
    overlap: float | None = None
    agreement: float | None = None
    if common_field.mean() < MIN_COMMON:
        flags.append("no_overlap")
    else:
        a, b = ridge_map(filled(cf, valid_cf), dark=True), ridge_map(filled(fa, valid_fa), dark=False)
        overlap = dice(vessels(a, common_field), vessels(b, common_field))
        agreement = correlation(a[common_field], b[common_field])
        rows, columns = shift(a, b, common_field)
        distance = float(np.hypot(rows, columns))
        unit = max(cf.shape) / WORKING_SIDE
        if agreement < UNRELATED and _moved(a, b, common_field, rows, columns) < UNRELATED:
            flags.append("unrelated")
        else:
            moved = distance * scale
            flags += ["misregistered"] if distance > MAX_SHIFT_PX * unit else []
    seen = [float(np.mean(mask)) for mask in (images.valid_cf, images.valid_fa, images.valid_cf & images.valid_fa)]
    if min(seen[:2]) < LITTLE_SEEN:
        flags.append("little_seen")
    return PairFindings(
        name=pair.name,
        eye=pair.eye,
        patient=pair.patient or patient_of(pair.eye),
        width=pair.width,
        height=pair.height,
        shift_px=_rounded(moved, 2),
        vessel_dice=_rounded(overlap, 3),
        ridge_correlation=_rounded(agreement, 3),
        valid_cf=round(seen[0], 3),
        valid_fa=round(seen[1], 3),
        common=round(seen[2], 3),
        flags=tuple(flags),
    )


def _sized(images: PairImages) -> tuple[Bytes, Bytes, Mask, Mask, float]:
    """CF's green channel, FA and their masks at no more than 512 px, and native pixels per pixel of these."""
    green = np.ascontiguousarray(images.cf[..., 1])
    scale = max(1.0, max(green.shape) / WORKING_SIDE)
    size = (max(1, round(green.shape[1] / scale)), max(1, round(green.shape[0] / scale)))
    if scale == 1.0:
        return green, images.fa, images.valid_cf, images.valid_fa, scale

    def image(pixels: Bytes) -> Bytes:
        return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))

    def mask(valid: Mask) -> Mask:
        return np.asarray(cv2.resize(valid.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0)

    return image(green), image(images.fa), mask(images.valid_cf), mask(images.valid_fa), scale


def _moved(a: Map, b: Map, field: Mask, rows: float, columns: float) -> float:
    """Ridge correlation after ``b`` was moved."""
    matrix = np.array([[1.0, 0.0, columns], [0.0, 1.0, rows]])
    size = (a.shape[1], a.shape[0])
    there = cv2.warpAffine(b, matrix, size)
    seen = field & (cv2.warpAffine(field.astype(np.uint8), matrix, size, flags=cv2.INTER_NEAREST) > 0)
    return correlation(a[seen], there[seen]) if seen.mean() >= MIN_COMMON else 0.0


def _exact(found: Sequence[PairFindings], digests: Sequence[tuple[str, str]]) -> list[Likeness]:
    """Pairs whose CF, FA or both have the same pixels; each with the first that has them."""
    alike: list[Likeness] = []
    for kind, choose in (("same_cf", 0), ("same_fa", 1)):
        first: dict[str, int] = {}
        for index, digest in enumerate(digests):
            other = first.setdefault(digest[choose], index)
            if other == index:
                continue
            both = digests[other] == digest
            if both and kind == "same_fa":
                continue  # told already
            alike.append(_likeness(found, other, index, "exact" if both else kind, 0.0, 0))
    return alike


def _near(found: Sequence[PairFindings], pictures: Sequence[Thumbnails]) -> list[Likeness]:
    """Pairs that are nearer than ``NEAR`` in any of the eight turns, moved by up to a tenth of the side; of different
    eyes those nearer than ``SAME_EYE``."""
    if len(pictures) < 2:
        return []
    small = np.stack([_halved(picture) for picture in pictures])
    side = small.shape[-1]
    reach = SHIFTS if len(small) <= MOST_SHIFTED else 0
    steps = np.arange(-reach, reach + 1)
    spectra = np.conj(fft.rfft2(small)) if reach else None
    flat = small.reshape(len(small), -1)
    alike: list[Likeness] = []
    for index in range(1, len(small)):
        best: dict[int, tuple[float, int]] = {}
        for turn in range(8):
            query = np.ascontiguousarray(turned(small[index], turn)).astype(np.float32)
            if spectra is None:
                near = flat[:index] @ query.reshape(-1)
            else:
                product = (fft.rfft2(query) * spectra[:index]).sum(axis=1)
                whole = fft.irfft2(product, s=(side, side))
                near = whole[:, steps[:, None], steps[None, :]].reshape(index, -1).max(axis=1)
            for other in np.flatnonzero(1.0 - near < SAME_EYE):
                distance = max(0.0, 1.0 - float(near[other]))
                best[int(other)] = min(best.get(int(other), (np.inf, 0)), (distance, turn))
        for known, (distance, turn) in sorted(best.items()):
            if distance < NEAR or found[known].eye != found[index].eye:
                kind = "near" if distance < NEAR else "same_eye"
                alike.append(_likeness(found, known, index, kind, distance, turn))
    return alike


def _halved(picture: Thumbnails) -> npt.NDArray[np.float32]:
    """``(2, 64, 64)`` as ``(2, 32, 32)``, each plane of energy 1/2 again (or empty)."""
    half = SIDE // 2
    small = picture.reshape(2, half, 2, half, 2).mean(axis=(2, 4))
    energy = np.sqrt((small**2).sum(axis=(1, 2), keepdims=True))
    return np.asarray(np.where(energy > 1e-6, small * np.sqrt(0.5) / np.maximum(energy, 1e-6), 0), np.float32)


def _likeness(
    found: Sequence[PairFindings], first: int, second: int, kind: str, distance: float, turn: int
) -> Likeness:
    one, two = found[first], found[second]
    return Likeness(one.name, two.name, kind, round(distance, 4), turn, one.eye == two.eye)


def _leaks(
    found: Sequence[PairFindings], alike: Sequence[Likeness], split: Mapping[str, Collection[str]]
) -> list[dict[str, Any]]:
    """What ties two parts of a split together: a patient with eyes in both, or one picture in both."""
    part = {name: which for which, names in split.items() for name in names}
    of_patient: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for pair in found:
        if pair.name in part:
            of_patient[pair.patient][part[pair.name]].append(pair.name)
    leaks: list[dict[str, Any]] = [
        {"kind": "patient", "patient": patient, "parts": {which: sorted(names) for which, names in parts.items()}}
        for patient, parts in sorted(of_patient.items())
        if len(parts) > 1
    ]
    for like in alike:
        parts = {part.get(like.first), part.get(like.second)}
        if None not in parts and len(parts) == 2:
            listed = {part[name]: [name] for name in (like.first, like.second)}
            leaks.append({"kind": like.kind, "patient": None, "parts": listed})
    return leaks


def _report(
    found: Sequence[PairFindings], alike: Sequence[Likeness], leaks: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    added: dict[str, set[str]] = defaultdict(set)
    for like in alike:
        if (flag := LIKENESS_FLAGS.get(like.kind)) is not None:
            added[like.first].add(flag)
            added[like.second].add(flag)
    for leak in leaks:
        for name in (name for names in leak["parts"].values() for name in names):
            added[name].add("leak")
    pairs = [{**asdict(pair), "flags": [*pair.flags, *sorted(added[pair.name])]} for pair in found]
    flags = Counter(flag for pair in pairs for flag in pair["flags"])
    sizes = Counter(f"{pair.width}x{pair.height}" for pair in found)
    shifts = [pair.shift_px for pair in found if pair.shift_px is not None]
    overlaps = [pair.vessel_dice for pair in found if pair.vessel_dice is not None]
    return {
        "state": "done",
        "format": FORMAT,
        "summary": {
            "pairs": len(found),
            "eyes": len({pair.eye for pair in found}),
            "patients": len({pair.patient for pair in found}),
            "flagged": sum(1 for pair in pairs if pair["flags"]),
            "flags": dict(sorted(flags.items())),
            "sizes": dict(sizes.most_common()),
            "median_shift_px": _rounded(float(np.median(shifts)) if shifts else None, 2),
            "median_vessel_dice": _rounded(float(np.median(overlaps)) if overlaps else None, 3),
        },
        "pairs": pairs,
        "likenesses": [asdict(like) for like in alike],
        "leaks": list(leaks),
    }


def _digest(pixels: Bytes) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)
