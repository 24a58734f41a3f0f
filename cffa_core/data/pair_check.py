"""The check of one pair: read, decode, register, find the valid regions; all of its problems, not the first.

Which files are a pair was decided by ``layouts``; what becomes of the pair is the business of ``ingest``.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cffa_core.data.contracts import Bytes, CheckedPair, Limits, Mask, PairImages, Registration
from cffa_core.data.decoding import Decoder, Refused
from cffa_core.data.field_of_view import field_of_view
from cffa_core.data.layouts import Candidate
from cffa_core.data.registration import BadLandmarks, Points, fit, parse_points, warp
from cffa_core.data.sources import Source, read_text
from cffa_core.errors import Problem

SHOWN_SIDE = 320
NOTES = {
    "palette": "stored with a palette; its colours are used",
    "alpha": "has a transparent channel; what is transparent counts as not seen",
    "sixteen_bit": "16 bits per pixel; scaled to 8",
    "multi_page": "more than one page; the first is used",
    "grey_cf": "the CF has no colour; its grey is used for all three channels",
    "colour_fa": "the FA has colour; its luminance is used",
    "no_overlap": "CF and FA saw no common area; the pair carries no alignment",
    "few_good_points": "fewer than half of the landmarks agree with the registration",
}


@dataclass(frozen=True)
class Registered:
    """A pair before and after automatic registration, small and to be looked at; ``after`` is None if it was refused.

    ``cf`` (h, w, 3), ``before`` and ``after`` (h, w), u8, all on CF's grid.
    """

    name: str
    cf: Bytes
    before: Bytes
    after: Bytes | None

    @classmethod
    def show(cls, name: str, raw: PairImages, made: PairImages | None) -> Registered:
        """Scale the images of a pair down for show."""
        height, width = raw.cf.shape[:2]
        scale = SHOWN_SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))

        def small(pixels: Bytes) -> Bytes:
            return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))

        return cls(name, small(raw.cf), small(raw.fa), None if made is None else small(made.fa))


class PairCheck:
    """One candidate on its way to a checked pair; ``warnings`` is added to."""

    def __init__(
        self,
        source: Source,
        decoder: Decoder,
        candidate: Candidate,
        limits: Limits,
        warnings: list[Problem] | None = None,
        *,
        auto_register: bool = False,
    ) -> None:
        self._source = source
        self._decoder = decoder
        self._candidate = candidate
        self._limits = limits
        self._warnings = warnings if warnings is not None else []
        self._problems: list[Problem] = []
        self._auto_register = auto_register
        self.notes: list[str] = []
        """Codes of what was odd about the pair."""
        self.shown: Registered | None = None
        """What automatic registration did, if it was needed."""

    def run(self) -> tuple[tuple[CheckedPair, PairImages] | None, list[Problem]]:
        """The pair and its pixels, or None and what is wrong with it."""
        candidate = self._candidate
        cf = self._decode(candidate.cf)
        fa = self._decode(candidate.fa)
        points = self._landmarks()
        if cf is None or fa is None or self._problems:
            return None, self._problems
        cf = self._as_colour(cf)
        fa = self._as_grey(fa)
        masks = self._masks(cf.shape[:2])
        if points is not None:
            made = self._registered(cf, fa, masks, *points)
        elif self._auto_register:
            made = self._auto_registered(PairImages(cf, fa, field_of_view(cf), field_of_view(fa), masks))
        elif cf.shape[:2] != fa.shape[:2]:
            sizes = f"CF is {cf.shape[1]}x{cf.shape[0]}, FA {fa.shape[1]}x{fa.shape[0]} pixels"
            self._problem(
                candidate.fa, "size_mismatch", f"{sizes}; register the pair, add landmarks for both, or auto_register"
            )
            return None, self._problems
        else:
            made = self._made(PairImages(cf, fa, field_of_view(cf), field_of_view(fa), masks), "given", None)
        return made, self._problems

    def _problem(self, pointer: str, code: str, message: str) -> None:
        self._problems.append(Problem(pointer, code, message))

    def _note(self, pointer: str, code: str) -> None:
        self._warnings.append(Problem(pointer, code, NOTES[code]))
        self.notes.append(code)

    def _decode(self, name: str) -> Bytes | None:
        data = self._source.read(name)
        if isinstance(data, Problem):
            self._problems.append(data)
            return None
        decoded = self._decoder.decode(data)
        if isinstance(decoded, Refused):
            self._problem(name, decoded.code, decoded.message)
            return None
        for note in decoded.notes:
            self._note(name, note)
        return decoded.pixels

    def _as_colour(self, cf: Bytes) -> Bytes:
        grey = cf.ndim == 2
        if grey or (np.array_equal(cf[..., 0], cf[..., 1]) and np.array_equal(cf[..., 0], cf[..., 2])):
            self._note(self._candidate.cf, "grey_cf")
        return np.repeat(cf[..., None], 3, axis=2) if grey else cf

    def _as_grey(self, fa: Bytes) -> Bytes:
        if fa.ndim == 2:
            return fa
        if not (np.array_equal(fa[..., 0], fa[..., 1]) and np.array_equal(fa[..., 0], fa[..., 2])):
            self._note(self._candidate.fa, "colour_fa")
        return np.asarray(cv2.cvtColor(fa, cv2.COLOR_RGB2GRAY))

    def _masks(self, shape: tuple[int, ...]) -> dict[str, Mask]:
        """The masks that came with the pair, by name; what is wrong with one is a problem.

        Vessels are in every eye, a disc or a lesion need not be: only a mask of vessels may not be empty.
        """
        masks: dict[str, Mask] = {}
        vessel = self._candidate.vessel
        for mask, name in (*((("vessel", vessel),) if vessel is not None else ()), *self._candidate.annotations):
            marked = self._mask(name, shape)
            if marked is not None and mask == "vessel" and not marked.any():
                self._problem(name, "empty_mask", "the mask is empty: no pixel is brighter than 127; vessels are white")
            elif marked is not None:
                masks[mask] = marked
        return dict(sorted(masks.items()))

    def _mask(self, name: str, shape: tuple[int, ...]) -> Mask | None:
        """One mask, white above 127, on CF's grid; None if it is none."""
        pixels = self._decode(name)
        if pixels is None:
            return None
        if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
            pixels = pixels[..., 0]
        if pixels.ndim == 3:
            message = "a mask has one channel; save it as a grey image, white where the structure is"
            self._problem(name, "bad_mask", message)
        elif pixels.shape != shape:
            sizes = f"the mask is {pixels.shape[1]}x{pixels.shape[0]}, its CF {shape[1]}x{shape[0]} pixels"
            self._problem(name, "mask_size", f"{sizes}; draw the mask on the CF")
        else:
            return np.asarray(pixels > 127)
        return None

    def _landmarks(self) -> tuple[Points, Points] | None:
        """Points of CF and FA; None if the pair has none (or a problem with them)."""
        names = (self._candidate.cf_points, self._candidate.fa_points)
        if names == (None, None):
            return None
        if None in names:
            self._problem(names[0] or names[1] or "", "bad_landmarks", "landmarks of only one of the two images")
            return None
        parsed = [points for name in names if name and (points := self._points(name)) is not None]
        return (parsed[0], parsed[1]) if len(parsed) == 2 else None

    def _points(self, name: str) -> Points | None:
        text = read_text(self._source, name, self._limits)
        if isinstance(text, Problem):
            self._problems.append(text)
            return None
        try:
            return parse_points(text)
        except BadLandmarks as error:
            self._problem(name, "bad_landmarks", str(error))
            return None

    def _registered(
        self, cf: Bytes, fa: Bytes, masks: dict[str, Mask], cf_points: Points, fa_points: Points
    ) -> tuple[CheckedPair, PairImages] | None:
        pointer = self._candidate.fa_points or self._candidate.fa
        try:
            transform = fit(fa_points, cf_points, (fa.shape[1], fa.shape[0]))
        except BadLandmarks as error:
            self._problem(pointer, "bad_landmarks", str(error))
            return None
        if 2 * transform.good < transform.total:
            self._note(pointer, "few_good_points")
        warped, seen = warp(fa, field_of_view(fa), transform, (cf.shape[1], cf.shape[0]))
        images = PairImages(cf, warped, field_of_view(cf), seen, masks)
        return self._made(images, transform.kind, transform.residual_px)

    def _auto_registered(self, images: PairImages) -> tuple[CheckedPair, PairImages] | None:
        """The pair with its FA brought onto the CF by their vessels; None, and a warning, where that fails."""
        from cffa_core.data import auto_registration  # SimpleITK, which most checks do without

        cf, fa = images.cf, images.fa
        if cf.shape[:2] == fa.shape and auto_registration.is_aligned(cf, fa, images.valid_cf, images.valid_fa):
            return self._made(images, "given", None)
        outcome = auto_registration.register(cf, fa, images.valid_cf, images.valid_fa)
        if outcome.matrix is None:
            self._warnings.append(Problem(self._candidate.fa, auto_registration.REFUSED, outcome.reason))
            self.shown = Registered.show(self._candidate.name, images, None)
            return None
        made = auto_registration.applied(outcome, images)
        self.shown = Registered.show(self._candidate.name, images, made)
        return self._made(made, "auto", None)

    def _made(
        self, images: PairImages, registration: Registration, residual: float | None
    ) -> tuple[CheckedPair, PairImages] | None:
        for pointer, valid in ((self._candidate.cf, images.valid_cf), (self._candidate.fa, images.valid_fa)):
            if not valid.any():
                self._problem(pointer, "black", "the image is black throughout")
        if self._problems:
            return None
        if not (images.valid_cf & images.valid_fa).any():
            self._note(self._candidate.fa, "no_overlap")
        name = self._candidate.name
        height, width = images.fa.shape
        residual = None if residual is None else round(residual, 4)
        return CheckedPair(name, name, width, height, registration, residual, tuple(sorted(images.masks))), images
