"""Which eye and which patient each pair belongs to: by what stands beside it, or a pattern on its name.

A stranger's pattern runs in the limited child of ``decoding``, never here. Nothing here opens a file or divides pairs;
what a split may divide follows from ``contracts.undivided``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cffa_core.data.contracts import CheckedPair
from cffa_core.data.decoding import Decoder, Refused
from cffa_core.data.layouts import Found
from cffa_core.data.sources import printable
from cffa_core.errors import Problem

EYE_PATTERN, PATIENT_PATTERN = "/eye_pattern", "/patient_pattern"
WITHOUT_PATIENT = "without_patient"
NAMED = 5


def eyes_of(found: Found, decoder: Decoder, pattern: str | None) -> dict[str, str]:
    """Eye of each candidate by name: column or eyes.csv, else the pattern, else its own name.

    A pattern that cannot serve becomes a problem of ``found``.
    """
    called = {candidate.name: candidate.called for candidate in found.candidates}
    matched, problems = matched_by(decoder, pattern, called, EYE_PATTERN)
    found.problems += problems
    own = {candidate.name: candidate.eye for candidate in found.candidates if candidate.eye}
    chosen = {name: found.eyes.get(name) or own.get(name) or matched.get(name) or name for name in called}
    return {name: printable(eye) for name, eye in chosen.items()}


def patients_of(found: Found, eyes: Mapping[str, str], decoder: Decoder, pattern: str | None) -> dict[str, str]:
    """Patient of each candidate by name, as far as one is known: column or eyes.csv, else the pattern.

    ``eyes`` are those of all candidates; all pairs of an eye have its patient. What is wrong becomes a problem of
    ``found``; pairs whose patient stays unknown, where that of others is known, a warning.
    """
    stated = {candidate.name: candidate.patient for candidate in found.candidates if candidate.patient}
    stated |= found.patients
    called = {candidate.name: candidate.called for candidate in found.candidates}
    matched, problems = matched_by(decoder, pattern, called, PATIENT_PATTERN)
    patients, wrong = _of_whole_eyes(eyes, {**matched, **stated})
    found.problems += [*problems, *wrong]
    if (pattern is not None or stated) and not (problems or wrong):
        found.warnings += without_patient(eyes, patients)
    return patients


def known_anew(
    pairs: Sequence[CheckedPair], decoder: Decoder, *, eye_pattern: str | None = None, patient_pattern: str | None
) -> tuple[list[CheckedPair], list[Problem]]:
    """Checked pairs with the eyes and patients that the patterns find in their names, else those that they have; and
    what is wrong."""
    called = {pair.name: pair.called for pair in pairs}
    matched, bad_eyes = matched_by(decoder, eye_pattern, called, EYE_PATTERN)
    eyes = {pair.name: matched.get(pair.name, pair.eye) for pair in pairs}
    known = {pair.name: pair.patient for pair in pairs if pair.patient is not None}
    told, bad_patients = matched_by(decoder, patient_pattern, called, PATIENT_PATTERN)
    patients, wrong = _of_whole_eyes(eyes, {**known, **told})
    made = [replace(pair, eye=eyes[pair.name], patient=patients.get(pair.name)) for pair in pairs]
    return made, [*bad_eyes, *bad_patients, *wrong]


def _of_whole_eyes(eyes: Mapping[str, str], told: Mapping[str, str]) -> tuple[dict[str, str], list[Problem]]:
    """The patients that are told of some pairs as those of all pairs of the same eyes; an eye of two is a problem."""
    problems: list[Problem] = []
    of_eye: dict[str, set[str]] = {}
    for name, patient in told.items():
        of_eye.setdefault(eyes[name], set()).add(printable(patient))
    for eye, patients in sorted(of_eye.items()):
        if len(patients) > 1:
            message = f"the eye {eye!r} would belong to {_listed(sorted(patients))}; mend the patterns or eyes.csv"
            problems.append(Problem(PATIENT_PATTERN, "eye_of_two_patients", message))
    return {name: min(of_eye[eye]) for name, eye in eyes.items() if eye in of_eye}, problems


def without_patient(eyes: Mapping[str, str], patients: Mapping[str, str]) -> list[Problem]:
    """A warning that names pairs whose patient nothing tells: a split keeps only their eyes whole."""
    missing = [name for name in eyes if name not in patients]
    if not missing:
        return []
    message = (
        f"{len(missing)} of {len(eyes)} pairs have no patient, e.g. {_listed(missing)}; only their eyes stay whole"
    )
    return [Problem(PATIENT_PATTERN, WITHOUT_PATIENT, message)]


def matched_by(
    decoder: Decoder, pattern: str | None, called: Mapping[str, str], pointer: str
) -> tuple[dict[str, str], list[Problem]]:
    """What ``pattern`` finds, by name, in what the pairs were ``called`` when they came, where it finds something; a
    pattern that cannot serve is a problem."""
    if pattern is None:
        return {}, []
    answer = decoder.matches(pattern, list(called.values()))
    if isinstance(answer, Refused):
        return {}, [Problem(pointer, f"bad_{pointer.removeprefix('/')}", answer.message)]
    return {name: match for name, match in zip(called, answer, strict=True) if match}, []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more
