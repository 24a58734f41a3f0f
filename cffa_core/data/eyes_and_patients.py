"""Which eye and which patient each pair of a source belongs to: by what stands beside it, or a pattern on its name.

A stranger's pattern runs in the limited child of ``decoding``, never here. Nothing here opens a file or divides pairs;
what a split may divide follows from ``contracts.undivided``.
"""

from __future__ import annotations

from collections.abc import Mapping

from cffa_core.data.decoding import Decoder, Refused
from cffa_core.data.layouts import Found
from cffa_core.data.sources import printable
from cffa_core.errors import Problem

EYE_PATTERN, PATIENT_PATTERN = "/eye_pattern", "/patient_pattern"
NAMED = 5


def eyes_of(found: Found, decoder: Decoder, pattern: str | None) -> dict[str, str]:
    """Eye of each candidate by name: column or eyes.csv, else the pattern, else its own name.

    A pattern that cannot serve becomes a problem of ``found``.
    """
    names = [candidate.name for candidate in found.candidates]
    matched, problems = matched_by(decoder, pattern, names, EYE_PATTERN)
    found.problems += problems
    own = {candidate.name: candidate.eye for candidate in found.candidates if candidate.eye}
    chosen = {name: found.eyes.get(name) or own.get(name) or matched.get(name) or name for name in names}
    return {name: printable(eye) for name, eye in chosen.items()}


def patients_of(
    eyes: Mapping[str, str], decoder: Decoder, pattern: str | None, known: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[Problem]]:
    """Patient of each pair by name, as far as one is known, and what is wrong; ``eyes`` are those of all pairs.

    A patient is what the pattern matches in a pair's name (else what is ``known`` of it), and then that of all pairs of
    the same eye. An eye that would belong to two patients is a problem.
    """
    matched, problems = matched_by(decoder, pattern, list(eyes), PATIENT_PATTERN)
    of_eye: dict[str, set[str]] = {}
    for name, patient in {**(known or {}), **matched}.items():
        of_eye.setdefault(eyes[name], set()).add(printable(patient))
    for eye, patients in sorted(of_eye.items()):
        if len(patients) > 1:
            message = f"the eye {eye!r} would belong to {_listed(sorted(patients))}; mend the patterns or eyes.csv"
            problems.append(Problem(PATIENT_PATTERN, "eye_of_two_patients", message))
    return {name: min(of_eye[eye]) for name, eye in eyes.items() if eye in of_eye}, problems


def without_patient(eyes: Mapping[str, str], patients: Mapping[str, str]) -> list[Problem]:
    """A warning that names pairs whose patient a pattern did not tell: a split keeps only their eyes whole."""
    missing = [name for name in eyes if name not in patients]
    if not missing:
        return []
    message = (
        f"{len(missing)} of {len(eyes)} pairs have no patient, e.g. {_listed(missing)}; only their eyes stay whole"
    )
    return [Problem(PATIENT_PATTERN, "without_patient", message)]


def matched_by(
    decoder: Decoder, pattern: str | None, names: list[str], pointer: str
) -> tuple[dict[str, str], list[Problem]]:
    """What ``pattern`` finds in the names in which it finds something; a pattern that cannot serve is a problem."""
    if pattern is None:
        return {}, []
    answer = decoder.matches(pattern, names)
    if isinstance(answer, Refused):
        return {}, [Problem(pointer, f"bad_{pointer.removeprefix('/')}", answer.message)]
    return {name: match for name, match in zip(names, answer, strict=True) if match}, []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(repr(name) for name in names[:NAMED]) + more
