"""Versions of a checked data set: some of its pairs, and a split by eye that is locked into it.

A version shares the images of the data set that it was made from; it has an index (dataset.json) and a digest of its
own. Works on indices alone: no pixel is opened, and where the files lie is the caller's business.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from cffa_core.data.contracts import CheckedPair, undivided
from cffa_core.data.dataset_folder import files_of
from cffa_core.errors import InvalidSpec, Problem

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
Split = dict[str, list[str]]


def split_by_fraction(pairs: Sequence[CheckedPair], fractions: Mapping[Part, float], seed: int) -> Split:
    """Names of pairs for train, validation and test, so that about the given fractions of the EYES are in each.

    All eyes of a known patient stay together and count as one. Fractions are taken relative to their sum. Every part
    with a fraction above 0 gets an eye at least. The same eyes and seed give the same split, in whatever order the
    pairs come. Raises ``InvalidSpec`` if there are too few eyes (or patients).
    """
    wanted = {part: float(fractions.get(part, 0.0)) for part in PARTS}
    some = [part for part in PARTS if wanted[part] > 0]
    whole = sorted({undivided(pair.eye, pair.patient) for pair in pairs})
    if wanted["train"] <= 0 or len(whole) < len(some):
        known = any(pair.patient is not None for pair in pairs)
        what = "patients (and eyes of unknown ones)" if known else "eyes"
        message = f"{len(whole)} {what} cannot be split into {len(some)} parts of which one is train"
        raise InvalidSpec(message, problems=(Problem("/split", "too_few_eyes", message),))
    random.Random(int.from_bytes(hashlib.sha256(f"split by eye {seed}".encode()).digest(), "big")).shuffle(whole)
    counts = _counts(len(whole), {part: wanted[part] for part in some})
    of: dict[str, str] = {}
    for part in PARTS:
        taken, whole = whole[: counts.get(part, 0)], whole[counts.get(part, 0) :]
        of |= dict.fromkeys(taken, part)
    return {part: [pair.name for pair in pairs if of[undivided(pair.eye, pair.patient)] == part] for part in PARTS}


def _counts(total: int, shares: Mapping[Part, float]) -> dict[Part, int]:
    """Whole numbers that add up to ``total``, near the shares (largest remainder), none of them 0."""
    exact = {part: total * share / sum(shares.values()) for part, share in shares.items()}
    counts = {part: max(1, int(value)) for part, value in exact.items()}
    by_remainder = sorted(exact, key=lambda part: counts[part] - exact[part])
    while sum(counts.values()) < total:
        nearest = min(by_remainder, key=lambda part: counts[part] - exact[part])
        counts[nearest] += 1
    while sum(counts.values()) > total:
        largest = max(counts, key=lambda part: counts[part] - exact[part] if counts[part] > 1 else -total)
        counts[largest] -= 1
    return counts


def split_by_eyes(pairs: Sequence[CheckedPair], eyes: Mapping[str, Collection[str]]) -> Split:
    """Names of pairs for train, validation and test from the eyes of each; pairs of other eyes are in none.

    Raises ``InvalidSpec`` naming every eye that is unknown or in two parts, every known patient whose eyes are in two
    parts, and if there is nothing to train on.
    """
    known = {pair.eye for pair in pairs}
    problems = [
        Problem(f"/split/{part}", "unknown_eye", f"no pair belongs to the eye {eye!r}")
        for part in PARTS
        for eye in sorted(set(eyes.get(part, ())) - known)
    ]
    of: dict[str, str] = {}
    for part in PARTS:
        for eye in sorted(set(eyes.get(part, ()))):
            if eye in of:
                problems.append(Problem(f"/split/{part}", "eye_in_two_parts", f"the eye {eye!r} is in {of[eye]} too"))
            of.setdefault(eye, part)
    problems += _divided(pairs, of)
    if not eyes.get("train"):
        problems.append(Problem("/split/train", "empty", "name at least one eye to train on"))
    if problems:
        raise InvalidSpec("the split is not one by eye; see errors", problems=tuple(problems))
    return {part: [pair.name for pair in pairs if of.get(pair.eye) == part] for part in PARTS}


def require_whole_patients(pairs: Sequence[CheckedPair], split: Split) -> None:
    """Raise ``InvalidSpec`` naming each known patient of whom the split, made when less was known, divides the eyes."""
    part_of = {name: part for part, names in split.items() for name in names}
    of = {pair.eye: part_of[pair.name] for pair in pairs if pair.name in part_of}
    if problems := _divided(pairs, of):
        message = "the split that the data set has divides patients; give a new split too, see errors"
        raise InvalidSpec(message, problems=tuple(problems))


def _divided(pairs: Sequence[CheckedPair], of: Mapping[str, str]) -> list[Problem]:
    """Problems that name each known patient whose eyes are in two parts, at the later of them."""
    parts: dict[str, set[str]] = {}
    for pair in pairs:
        if pair.patient is not None and pair.eye in of:
            parts.setdefault(pair.patient, set()).add(of[pair.eye])
    problems = []
    for patient, found in sorted(parts.items()):
        first, *others = [part for part in PARTS if part in found]
        message = f"eyes of the patient {patient!r} are in {first} too; all eyes of a patient go into one part"
        problems += [Problem(f"/split/{part}", "patient_in_two_parts", message) for part in others]
    return problems


def without(pairs: Sequence[CheckedPair], reject: Collection[str]) -> list[CheckedPair]:
    """The pairs that are not rejected, by names or original names; raises ``InvalidSpec`` naming unknown names, or if
    none is left."""
    known = {pair.name for pair in pairs} | {pair.called for pair in pairs}
    problems = [
        Problem(f"/reject/{number}", "unknown_pair", f"no pair is named {name!r}")
        for number, name in enumerate(reject)
        if name not in known
    ]
    gone = set(reject)
    kept = [pair for pair in pairs if pair.name not in gone and pair.called not in gone]
    if not problems and not kept:
        problems.append(Problem("/reject", "too_few_pairs", "no pair would be left; a data set needs at least one"))
    if problems:
        raise InvalidSpec("these pairs cannot be rejected; see errors", problems=tuple(problems))
    return kept


def version_index(
    index: Mapping[str, Any],
    kept: Sequence[CheckedPair],
    split: Split | None,
    sha256: Mapping[str, str],
    captions: str | None = None,
) -> dict[str, Any]:
    """The dataset.json of a version: entries of ``kept`` (in order) out of ``index``, the split, and the digest.

    The digest is a SHA-256 over names, eyes, the SHA-256 of each stored file (``sha256``, by name), the split, the
    patients that are known, and the SHA-256 of the ``captions`` if there are any: two versions are equal if and only if
    they hold the same pairs, with the same images and captions, for the same purposes.
    """
    entries = {entry["name"]: entry for entry in index["pairs"]}
    chosen = [entries[pair.name] for pair in kept]
    content = {
        "pairs": [[entry["name"], entry["eye"], [sha256[file] for file in files_of(entry)]] for entry in chosen],
        "split": split,
        **({} if captions is None else {"captions": captions}),
        **({"patients": patients} if (patients := {e["name"]: e["patient"] for e in chosen if "patient" in e}) else {}),
    }
    text = json.dumps(["cffa-dataset-version/1", content], sort_keys=True, separators=(",", ":"))
    made = {**index, "digest": hashlib.sha256(text.encode()).hexdigest(), "pairs": chosen}
    made.pop("split", None)
    return made if split is None else {**made, "split": split}
