"""Patients by a table or a pattern on the pairs' names: found, spread over an eye, refused, kept, never divided."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.data.dataset_folder import read_index
from cffa_core.data.export import export_pairs
from cffa_core.data.ingest import Limits, check, open_pairs, write
from cffa_core.data.pairs import load_pairs
from cffa_core.errors import InvalidDataset
from tests.raw_pairs import draw_pair, encode, write_folder

NAMES = ("p1_OD_a", "p1_OD_b", "p1_OS", "p2_OD", "p3_OS", "x9")
EYE, PATIENT = r"^(p\d)_(O[DS])", r"^(p\d)_"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six pairs: two of one eye and one of the other eye of p1, one each of p2 and p3, one that follows no pattern."""
    files = {}
    for index, name in enumerate(NAMES):
        cf, fa = draw_pair(index)
        files |= {f"cf/{name}.png": encode(cf), f"fa/{name}.png": encode(fa)}
    return write_folder(tmp_path / "set", files)


def test_patients_come_from_the_pattern(source: Path) -> None:
    plain = check(source, eye_pattern=EYE)
    assert [pair.patient for pair in plain.pairs] == [None] * 6
    assert plain.patients is None and "patients" not in plain.report()["counts"]
    known = check(source, eye_pattern=EYE, patient_pattern=PATIENT)
    assert known.ok and [pair.patient for pair in known.pairs] == ["p1", "p1", "p1", "p2", "p3", None]
    assert known.patients == known.report()["counts"]["patients"] == 3
    assert [pair.eye for pair in known.pairs] == [pair.eye for pair in plain.pairs]
    assert known.digest != plain.digest
    (warning,) = known.warnings
    assert (warning.pointer, warning.code) == ("/patient_pattern", "without_patient")
    assert "1 of 6" in warning.message and "x9" in warning.message


def test_all_pairs_of_an_eye_have_its_patient(source: Path) -> None:
    known = check(source, eye_pattern=EYE, patient_pattern=r"^(p1)_OD_a")
    assert [pair.patient for pair in known.pairs] == ["p1", "p1", None, None, None, None]


def test_patients_come_from_eyes_csv_then_the_pattern(source: Path) -> None:
    (source / "eyes.csv").write_text("name,eye,patient\np1_OD_a.png,one,anna\np1_OD_b,one,\np1_OS,two,anna\np2_OD,2,\n")
    stated = check(source)
    assert [pair.patient for pair in stated.pairs] == ["anna", "anna", "anna", None, None, None]
    assert [(w.pointer, w.code) for w in stated.warnings] == [("/patient_pattern", "without_patient")]
    both = check(source, patient_pattern=PATIENT)
    assert [pair.patient for pair in both.pairs] == ["anna", "anna", "anna", "p2", "p3", None]


def test_patients_come_from_the_pair_list(source: Path) -> None:
    rows = [f"cf/{name}.png,fa/{name}.png,{patient}" for name, patient in zip(NAMES, "aaabbc", strict=True)]
    (source / "pairs.csv").write_text("\n".join(["cf_path,fa_path,patient", *rows]) + "\n")
    found = check(source)
    assert found.ok and [pair.patient for pair in found.pairs] == list("aaabbc") and found.warnings == ()


def test_a_pair_of_two_patients_in_eyes_csv_is_a_problem(source: Path) -> None:
    (source / "eyes.csv").write_text("name,eye,patient\nx9,e,anna\nx9,e,bert\n")
    (found,) = check(source).problems
    assert (found.pointer, found.code) == ("eyes.csv:3", "bad_csv") and "two patients" in found.message


def test_an_eyes_csv_without_patients_is_what_it_was(source: Path) -> None:
    (source / "eyes.csv").write_text("name,eye\nx9,e\n")
    before = check(source)
    (source / "eyes.csv").write_text("name,eye,patient\nx9,e,\n")
    after = check(source)
    assert before.digest == after.digest and after.patients is None and after.warnings == ()


def test_an_eye_of_two_patients_is_a_problem(source: Path) -> None:
    found = check(source, eye_pattern=r"(O[DS])", patient_pattern=PATIENT)
    assert [(p.pointer, p.code) for p in found.problems] == [("/patient_pattern", "eye_of_two_patients")] * 2
    assert "'OD'" in found.problems[0].message and "'p1', 'p2'" in found.problems[0].message


@pytest.mark.parametrize("pattern", ["(", "(a|a)*b"])
def test_a_pattern_that_cannot_serve_is_a_problem(source: Path, pattern: str) -> None:
    for modality in ("cf", "fa"):
        (source / modality / f"{'a' * 40}.png").write_bytes((source / modality / "x9.png").read_bytes())
    found = check(source, Limits(), patient_pattern=pattern)
    assert [(p.pointer, p.code) for p in found.problems] == [("/patient_pattern", "bad_patient_pattern")]


def test_a_checked_folder_keeps_its_patients(source: Path, tmp_path: Path) -> None:
    write(check(source, eye_pattern=EYE, patient_pattern=PATIENT), tmp_path / "checked")
    _, pairs = read_index(tmp_path / "checked")
    assert [pair.patient for pair in pairs] == ["p1", "p1", "p1", "p2", "p3", None]
    export_pairs(tmp_path / "checked", tmp_path / "out", "folder")
    assert read_index(tmp_path / "out")[1] == pairs
    assert "Known patients: 3" in (tmp_path / "out" / "README.md").read_text()
    lines = (tmp_path / "out" / "eyes.csv").read_text().splitlines()
    assert lines[0] == "name,eye,patient" and lines[1] == "p1_OD_a,p1OD,p1" and lines[-1] == "x9,x9,"
    again = check(tmp_path / "out")
    assert [pair.patient for pair in again.pairs] == [pair.patient for pair in pairs]
    assert again.digest == check(source, eye_pattern=EYE, patient_pattern=PATIENT).digest
    _, renamed, _ = open_pairs(tmp_path / "checked", patient_pattern="^(x9)$")
    assert [pair.patient for pair in renamed] == ["p1", "p1", "p1", "p2", "p3", "x9"]
    with pytest.raises(InvalidDataset, match="would belong"):
        open_pairs(tmp_path / "checked", eye_pattern="(O[DS])")


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "checked"])
def test_a_holdout_never_divides_a_patient(source: Path, tmp_path: Path, raw: bool) -> None:
    patterns = {"eye_pattern": EYE, "patient_pattern": PATIENT}
    if not raw:
        write(check(source, **patterns), tmp_path / "checked")
    pairs = load_pairs(source, 32, **patterns) if raw else load_pairs(tmp_path / "checked", 32)
    assert len(pairs.eyes) == 5
    sides = set()
    for seed in range(12):
        train, held = pairs.for_training(0.5, seed)
        assert {pair.patient for pair in train} & {pair.patient for pair in held} == set()
        assert len(train) + len(held) == 6
        sides.add(tuple(pair.name for pair in held))
    assert len(sides) > 2
