"""Splits by eye and versions: no eye is ever divided, and a training keeps to the split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cffa_core.data.contracts import CheckedPair
from cffa_core.data.dataset_folder import part_folder, read_index
from cffa_core.data.pairs import load_pairs
from cffa_core.data.versions import PARTS, split_by_eyes, split_by_fraction, version_index
from cffa_core.errors import InvalidDataset, InvalidSpec
from tests.pair_folder import write_pair_folder


def pairs_of(eyes: list[int]) -> list[CheckedPair]:
    return [CheckedPair(f"p{n}", f"eye{eye}", 64, 64, "given", None) for n, eye in enumerate(eyes)]


@settings(max_examples=200, deadline=None)
@given(
    eyes=st.lists(st.integers(0, 12), min_size=3, max_size=60),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_no_eye_is_divided_and_no_pair_is_lost(eyes: list[int], shares: tuple[float, ...], seed: int) -> None:
    pairs = pairs_of(eyes)
    fractions = dict(zip(PARTS, shares, strict=True))
    wanted = [part for part in PARTS if fractions[part] > 0]
    if len(set(eyes)) < len(wanted):
        with pytest.raises(InvalidSpec):
            split_by_fraction(pairs, fractions, seed)
        return
    split = split_by_fraction(pairs, fractions, seed)
    assert sorted(name for names in split.values() for name in names) == sorted(pair.name for pair in pairs)
    eye_of = {pair.name: pair.eye for pair in pairs}
    of_parts = [{eye_of[name] for name in split[part]} for part in PARTS]
    assert sum(map(len, of_parts)) == len(set(eyes))
    assert all(bool(split[part]) == (fractions[part] > 0) for part in PARTS)
    assert split == {part: sorted(names, key=list(eye_of).index) for part, names in split.items()}
    assert {part: set(names) for part, names in split.items()} == {
        part: set(names) for part, names in split_by_fraction(pairs[::-1], fractions, seed).items()
    }


@settings(max_examples=100, deadline=None)
@given(
    patients=st.lists(st.integers(-3, 6), min_size=3, max_size=40),
    shares=st.tuples(st.floats(0.01, 1), st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 1000),
)
def test_no_known_patient_is_divided(patients: list[int], shares: tuple[float, ...], seed: int) -> None:
    """Each pair is an eye of its own; below 0 nobody knows the patient."""
    pairs = [
        replace(pair, patient=None if patient < 0 else f"eye{patient}")
        for pair, patient in zip(pairs_of(list(range(len(patients)))), patients, strict=True)
    ]
    fractions = dict(zip(PARTS, shares, strict=True))
    whole = len({patient for patient in patients if patient >= 0}) + sum(patient < 0 for patient in patients)
    if whole < sum(fractions[part] > 0 for part in PARTS):
        with pytest.raises(InvalidSpec, match="patients"):
            split_by_fraction(pairs, fractions, seed)
        return
    split = split_by_fraction(pairs, fractions, seed)
    assert sorted(name for names in split.values() for name in names) == sorted(pair.name for pair in pairs)
    patient_of = {pair.name: pair.patient for pair in pairs if pair.patient is not None}
    of_parts = [{patient_of[name] for name in split[part] if name in patient_of} for part in PARTS]
    assert sum(map(len, of_parts)) == len(set(patient_of.values()))


def test_eyes_by_name_may_not_divide_a_patient() -> None:
    pairs = [replace(pair, patient="p") for pair in pairs_of([0, 1])] + pairs_of([2, 2, 3])[2:]
    with pytest.raises(InvalidSpec) as caught:
        split_by_eyes(pairs, {"train": ["eye0"], "test": ["eye1"]})
    assert [(p.pointer, p.code) for p in caught.value.problems] == [("/split/test", "patient_in_two_parts")]
    split = split_by_eyes(pairs, {"train": ["eye0", "eye1"], "test": ["eye3"]})
    assert split == {"train": ["p0", "p1"], "validation": [], "test": ["p2"]}
    assert split_by_eyes(pairs, {"train": ["eye0"], "test": ["eye3"]})["train"] == ["p0"]


def test_the_digest_of_a_version_says_whose_pairs_they_are() -> None:
    pairs = pairs_of([0, 1])
    files = {kind: f"{kind}/x.png" for kind in ("cf", "fa", "valid_cf", "valid_fa")}
    entries = [{"name": pair.name, "eye": pair.eye, **files} for pair in pairs]
    sha256 = dict.fromkeys(files.values(), "0" * 64)
    digests = [
        version_index({"pairs": [entry | more for entry in entries]}, pairs, None, sha256)["digest"]
        for more in ({}, {"patient": "p"}, {"patient": "q"})
    ]
    assert len(set(digests)) == 3


def with_split(folder: Path, split: dict[str, list[str]]) -> Path:
    write_pair_folder(folder, n=6, eyes=6)
    index = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(index | {"split": split}))
    return folder


SPLIT = {"train": ["pair000", "pair003"], "validation": ["pair001"], "test": ["pair002", "pair004"]}


def test_a_training_takes_its_pairs_from_the_split_whatever_the_holdout(tmp_path: Path) -> None:
    loaded = load_pairs(with_split(tmp_path / "d", SPLIT), 64)
    for holdout in (0.0, 0.5):
        train, held = loaded.for_training(holdout, 3)
        assert [pair.name for pair in train] == SPLIT["train"]
        assert [pair.name for pair in held] == SPLIT["validation"]


def test_without_a_split_the_holdout_counts(tmp_path: Path) -> None:
    loaded = load_pairs(write_pair_folder(tmp_path / "d", n=6), 64)
    train, held = loaded.for_training(0.5, 3)
    assert (len(train), len(held)) == (3, 3)


def test_a_part_is_a_data_set_of_its_own(tmp_path: Path) -> None:
    whole = with_split(tmp_path / "d", SPLIT)
    part = part_folder(whole, "test", tmp_path / "t")
    digest, pairs = read_index(part)
    assert [pair.name for pair in pairs] == SPLIT["test"]
    assert digest != read_index(whole)[0]
    assert len(load_pairs(part, 64)) == 2
    with pytest.raises(InvalidDataset, match="split"):
        part_folder(write_pair_folder(tmp_path / "plain", n=2), "test", tmp_path / "u")
