"""From a folder or zip that somebody sent to a checked data set: every problem named at once, nothing extracted.

The work is split: ``sources`` streams members, ``layouts`` finds pairs among their names, ``eyes_and_patients`` says
whose they are, ``decoding`` decodes images in a limited child, ``pair_check`` registers a pair and finds its valid
regions, ``dataset_folder`` writes.
Nothing here knows torch, HTTP or the object store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cffa_core.data import dataset_folder
from cffa_core.data.captions import Caption, captions_text, counted
from cffa_core.data.contracts import Bytes, CheckedPair, Layout, Limits, Mask, PairImages, Registration
from cffa_core.data.decoding import Decoder
from cffa_core.data.eyes_and_patients import eyes_of, known_anew, patients_of
from cffa_core.data.layouts import Candidate, Found, find_pairs
from cffa_core.data.pair_check import PairCheck, Registered
from cffa_core.data.sources import Place, Source, open_source, printable, read_text
from cffa_core.errors import InvalidDataset, Problem

__all__ = ["Checked", "CheckedPair", "Layout", "Limits", "PairImages", "Registration", "check", "open_pairs", "write"]

MOST_SHOWN = 24  # registered pairs that are kept to be shown
KEPT_BYTES = 256 * 2**20  # decoded pairs of a small set are kept, so that writing it does not decode them again


@dataclass(frozen=True)
class Checked:
    """Result of :func:`check`: the pairs that passed, what was wrong (``problems``) and what was odd (``warnings``).

    ``registered`` shows some of the pairs that were registered without landmarks; ``notes`` are codes of warnings by
    name of pair.

    ``digest`` is a SHA-256 over names, eyes, pixels, valid regions, and patients, masks and captions (where there are
    any) of all pairs; the same pairs in another layout, folder or zip have the same digest.
    """

    source: Path | Place
    layout: Layout
    pairs: tuple[CheckedPair, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    digest: str
    limits: Limits = field(default_factory=Limits)
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)
    kept: dict[str, PairImages] = field(default_factory=dict, repr=False, compare=False)
    auto_register: bool = False
    registered: tuple[Registered, ...] = field(default=(), repr=False, compare=False)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    captions: dict[str, Caption] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """True if :func:`write` would take it in."""
        return not self.problems

    @property
    def eyes(self) -> int:
        """Number of different eyes."""
        return len({pair.eye for pair in self.pairs})

    @property
    def patients(self) -> int | None:
        """Number of different patients that are known; None if none is."""
        return len({pair.patient for pair in self.pairs if pair.patient is not None}) or None

    @property
    def captions_text(self) -> str:
        """The ``captions.jsonl`` of the checked data set; empty if it has none."""
        return captions_text(self.captions, (pair.name for pair in self.pairs))

    def decoded(self) -> Iterator[tuple[CheckedPair, PairImages]]:
        """Each pair with its pixels, one at a time; large sets are read and decoded again.

        Raises ``InvalidDataset`` if the source is no longer what was checked.
        """
        if len(self.kept) == len(self.pairs):
            yield from ((pair, self.kept[pair.name]) for pair in self.pairs)
            return
        digest = _Digest()
        changed = f"{self.source.name} changed while it was read"
        with open_source(self.source, self.limits) as source, Decoder(self.limits) as decoder:
            for pair, candidate in zip(self.pairs, self.candidates, strict=True):
                made, problems = PairCheck(
                    source, decoder, candidate, self.limits, auto_register=self.auto_register
                ).run()
                if made is None:
                    raise InvalidDataset(changed, problems=tuple(problems))
                digest.add(pair, made[1])
                yield pair, made[1]
        digest.add_captions(self.captions_text)
        if digest.hexdigest() != self.digest:
            raise InvalidDataset(changed)

    def report(self) -> dict[str, Any]:
        """JSON-ready: ok, layout, digest, counts, pairs, captions if there are any, problems and warnings."""
        return {
            "ok": self.ok,
            "layout": self.layout,
            "digest": self.digest,
            "counts": {
                "pairs": len(self.pairs),
                "eyes": self.eyes,
                **({} if self.patients is None else {"patients": self.patients}),
                "problems": len(self.problems),
                "warnings": len(self.warnings),
            },
            "pairs": [
                asdict(pair) | {"masks": list(pair.masks), "notes": list(self.notes.get(pair.name, ()))}
                for pair in self.pairs
            ],
            **({"captions": counted(self.captions.values())} if self.captions else {}),
            "problems": [asdict(problem) for problem in self.problems],
            "warnings": [asdict(warning) for warning in self.warnings],
        }


def check(
    source: Path | Place,
    limits: Limits | None = None,
    *,
    eye_pattern: str | None = None,
    patient_pattern: str | None = None,
    auto_register: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Checked:
    """Check a folder or zip in any of the three layouts (METHODS 1); never raises for what is inside.

    ``eye_pattern`` is a regular expression searched in each pair's name; the groups that matched, joined, are the eye
    (the whole match if it has no group). An ``eyes.csv`` or an eye column goes before it; without either each pair is
    an eye of its own. ``patient_pattern`` finds the patient in the same way, after a patient column of either file, and
    all pairs of an eye then have that patient; without any of them patients are not known. With ``auto_register`` pairs
    without landmarks whose vessels do not lie on each other are registered (``auto_registration``); one that cannot be
    is left out, with a warning
    ``not_registered``. Raises ``NotFound`` if there is nothing at ``source``.
    """
    limits = limits or Limits()
    digest = _Digest()
    passed: list[tuple[CheckedPair, Candidate]] = []
    kept: dict[str, PairImages] = {}
    shown: list[Registered] = []
    notes: dict[str, tuple[str, ...]] = {}
    room = KEPT_BYTES
    with open_source(source, limits) as opened, Decoder(limits) as decoder:
        found = _find(opened, limits)
        eyes = eyes_of(found, decoder, eye_pattern)
        patients = patients_of(found, eyes, decoder, patient_pattern)
        for index, candidate in enumerate(found.candidates):
            pair_check = PairCheck(opened, decoder, candidate, limits, found.warnings, auto_register=auto_register)
            made, problems = pair_check.run()
            found.problems += problems
            if pair_check.shown is not None and len(shown) < MOST_SHOWN:
                shown.append(pair_check.shown)
            if made is not None:
                pair = replace(
                    made[0],
                    eye=eyes[candidate.name],
                    patient=patients.get(candidate.name),
                    original_name=candidate.original_name,
                )
                digest.add(pair, made[1])
                passed.append((pair, candidate))
                notes[pair.name] = tuple(dict.fromkeys(pair_check.notes))
                room -= made[1].nbytes
                if room >= 0:
                    kept[pair.name] = made[1]
            if on_progress is not None:
                on_progress(index + 1, len(found.candidates))
    said = {pair.name: found.captions[pair.name] for pair, _ in passed if pair.name in found.captions}
    digest.add_captions(captions_text(said, said))
    wrong = _in_order(found.problems)
    if not passed:
        wrong = (*wrong, Problem("", "too_few_pairs", "there is no valid pair; a data set needs at least one"))
    return Checked(
        source=source,
        layout=found.layout,
        pairs=tuple(pair for pair, _ in passed),
        problems=wrong,
        warnings=_in_order(found.warnings),
        digest=digest.hexdigest(),
        limits=limits,
        candidates=tuple(candidate for _, candidate in passed),
        kept=kept,
        auto_register=auto_register,
        registered=tuple(shown),
        notes=notes,
        captions=said,
    )


def write(checked: Checked, folder: Path) -> dict[str, Any]:
    """Write the checked data set below ``folder``; return the content of its dataset.json.

    Raises ``InvalidDataset`` with all problems if there is any; then nothing is written.
    """
    if not checked.ok:
        count = len(checked.problems)
        raise InvalidDataset(
            f"{checked.source.name}: {count} problem(s), nothing was taken in", problems=checked.problems
        )
    return dataset_folder.write(folder, checked.digest, checked.decoded(), captions=checked.captions_text)


def open_pairs(
    path: Path,
    *,
    eye_pattern: str | None = None,
    patient_pattern: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[str, list[CheckedPair], Iterator[tuple[CheckedPair, PairImages]]]:
    """Digest, pairs and (one at a time) pixels of a checked folder or of a raw source, at native resolution.

    Patterns as in :func:`check`; on a checked folder they replace eyes and patients of the index where they match.
    Raises ``InvalidDataset`` with all problems, ``NotFound``, or ``CorruptArtifact`` for a damaged checked folder.
    """
    if not dataset_folder.is_dataset_folder(path):
        checked = check(path, eye_pattern=eye_pattern, patient_pattern=patient_pattern, on_progress=on_progress)
        if not checked.ok:
            raise InvalidDataset(f"{path}: {len(checked.problems)} problem(s)", problems=checked.problems)
        return checked.digest, list(checked.pairs), checked.decoded()
    digest, pairs = dataset_folder.read_index(path)
    if eye_pattern is not None or patient_pattern is not None:
        with Decoder(Limits()) as decoder:
            pairs, problems = known_anew(pairs, decoder, eye_pattern=eye_pattern, patient_pattern=patient_pattern)
        if problems:
            raise InvalidDataset(problems[0].message, problems=tuple(problems))
    return digest, pairs, dataset_folder.read_pairs(path, pairs)


def _find(source: Source, limits: Limits) -> Found:
    """Layout and candidates of a source, with the source's own problems in front."""
    if not source.names:
        empty = () if source.problems else (Problem("", "empty_archive", "there are no files in it"),)
        return Found("unknown", problems=[*source.problems, *empty])
    found = find_pairs(source.names, lambda name: read_text(source, name, limits))
    found.problems[:0] = source.problems
    names = dataset_folder.safe_names([candidate.name for candidate in found.candidates])
    found.eyes = {names[name]: eye for name, eye in found.eyes.items()}
    found.patients = {names[name]: patient for name, patient in found.patients.items()}
    found.candidates = [_renamed(candidate, names[candidate.name]) for candidate in found.candidates]
    found.warnings += _renamings(found.candidates)
    found.captions = {names[name]: replace(said, name=names[name]) for name, said in found.captions.items()}
    return found


def _renamed(candidate: Candidate, name: str) -> Candidate:
    original = None if candidate.name == name else printable(candidate.name)
    return replace(candidate, name=name, original_name=original)


def _renamings(candidates: list[Candidate]) -> list[Problem]:
    """A warning that says how many pairs had to be renamed, with one of them."""
    changed = [candidate for candidate in candidates if candidate.original_name is not None]
    if not changed:
        return []
    message = (
        f"{len(changed)} of {len(candidates)} pairs have names that are not safe everywhere and are called otherwise "
        f"here, e.g. {changed[0].original_name!r} is {changed[0].name}; original_name tells which is which"
    )
    return [Problem("", "renamed", message)]


def _in_order(problems: list[Problem]) -> tuple[Problem, ...]:
    """Each finding once, in order of file."""
    return tuple(sorted(set(problems), key=lambda problem: (problem.pointer, problem.code, problem.message)))


class _Digest:
    """SHA-256 over the pairs in order: names, eyes, pixels, valid regions, masks, patients; then over the captions."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256(b"cffa-dataset/1")

    def add(self, pair: CheckedPair, images: PairImages) -> None:
        """Add one pair."""
        head = (pair.name, pair.eye, str(pair.width), str(pair.height))
        self._hash.update("\x1f".join(head).encode())
        for part in (images.cf, images.fa, self._packed(images.valid_cf), self._packed(images.valid_fa)):
            self._hash.update(np.ascontiguousarray(part).data)
        for name in sorted(images.masks):
            self._hash.update(f"\x1f{name}\x1f".encode())
            self._hash.update(self._packed(images.masks[name]).data)
        if pair.patient is not None:  # a data set of which none is known keeps the digest that it always had
            self._hash.update(f"\x1fpatient=\x1f{pair.patient}".encode())

    def add_captions(self, text: str) -> None:
        """Add the captions of all pairs; a data set without any keeps the digest that it always had."""
        if text:
            self._hash.update(f"\x1fcaptions\x1f{text}".encode())

    @staticmethod
    def _packed(mask: Mask) -> Bytes:
        return np.packbits(mask)

    def hexdigest(self) -> str:
        """The digest so far, in hex."""
        return self._hash.hexdigest()
