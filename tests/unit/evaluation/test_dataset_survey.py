"""The survey of a data set: each planted fault is found, sound pairs are left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cffa_core.data.contracts import CheckedPair, PairImages
from cffa_core.data.phantom import make_phantom
from cffa_core.evaluation.dataset_survey import patient_of, survey
from cffa_core.evaluation.survey_sheet import flagged_sheet

SIDE = 256


@pytest.fixture(scope="module")
def sound() -> dict[str, PairImages]:
    """Five phantoms of five eyes."""
    made = {}
    for index in range(5):
        phantom = make_phantom(900 + index, SIDE)
        made[f"e{index}"] = PairImages(phantom.cf, phantom.fa, phantom.valid_cf, phantom.valid_fa)
    return made


def checked(
    images: dict[str, PairImages], eyes: dict[str, str] | None = None
) -> Iterator[tuple[CheckedPair, PairImages]]:
    for name, pair in images.items():
        height, width = pair.fa.shape
        yield CheckedPair(name, (eyes or {}).get(name, name), width, height, "given", None), pair


def flags(found: dict) -> dict[str, list[str]]:  # type: ignore[type-arg]
    return {pair["name"]: pair["flags"] for pair in found["pairs"] if pair["flags"]}


def moved(images: PairImages, rows: int, columns: int) -> PairImages:
    def roll(a: np.ndarray) -> np.ndarray:
        return np.roll(a, (rows, columns), (0, 1))

    return replace(images, fa=roll(images.fa), valid_fa=roll(images.valid_fa))


def test_sound_pairs_are_not_flagged(sound: dict[str, PairImages]) -> None:
    found = survey(checked(sound))
    assert flags(found) == {} and found["likenesses"] == [] and found["leaks"] == []
    assert found["summary"]["sizes"] == {f"{SIDE}x{SIDE}": 5}
    assert found["summary"]["median_shift_px"] < 1


def test_planted_faults_are_found_and_shown(sound: dict[str, PairImages], tmp_path: Path) -> None:
    flipped = sound["e2"]
    turned = PairImages(
        *(np.ascontiguousarray(a[:, ::-1]) for a in (flipped.cf, flipped.fa)),
        *(np.ascontiguousarray(a[:, ::-1]) for a in (flipped.valid_cf, flipped.valid_fa)),
    )
    planted = {
        **sound,
        "shifted": moved(make_pair(950), 4, -3),
        "copy": sound["e1"],
        "flipped": turned,
        "wrong_fa": replace(make_pair(951), fa=sound["e3"].fa, valid_fa=sound["e3"].valid_fa),
        "apart": halves(make_pair(952)),
    }
    notes = {"e0": ["grey_cf"], "e4": ["colour_fa", "alpha"]}
    split = {"train": ["e1", "e0"], "test": ["copy", "e4"]}
    found = survey(checked(planted), notes=notes, split=split)
    said = flags(found)
    assert "misregistered" in said["shifted"]
    shift = next(pair["shift_px"] for pair in found["pairs"] if pair["name"] == "shifted")
    assert shift == pytest.approx(5.0, abs=0.5)
    assert said["copy"] == ["duplicate", "leak"] == said["e1"]
    assert said["flipped"] == said["e2"] == ["near_duplicate"]
    assert said["e0"] == ["grey_cf"] and said["e4"] == ["colour_fa"]
    assert "unrelated" in said["wrong_fa"] and "no_overlap" in said["apart"]
    kinds = {(like["first"], like["second"]): like["kind"] for like in found["likenesses"]}
    assert kinds[("e1", "copy")] == "exact" and kinds[("e2", "flipped")] == "near"
    assert kinds[("e3", "wrong_fa")] == "same_fa"
    assert flagged_sheet(found, checked(planted), tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[1] > 9 * 200


def make_pair(seed: int) -> PairImages:
    phantom = make_phantom(seed, SIDE)
    return PairImages(phantom.cf, phantom.fa, phantom.valid_cf, phantom.valid_fa)


def halves(images: PairImages) -> PairImages:
    """CF saw the left half only, FA the right."""
    left = np.arange(SIDE)[None, :] < SIDE // 2
    return replace(images, valid_cf=images.valid_cf & left, valid_fa=images.valid_fa & ~left)


def test_a_patient_in_two_parts_leaks(sound: dict[str, PairImages]) -> None:
    eyes = {"e0": "p7_OD", "e1": "p7-OS", "e2": "p8_OD"}
    found = survey(checked({name: sound[name] for name in eyes}, eyes), split={"train": ["e0", "e2"], "test": ["e1"]})
    assert found["leaks"] == [{"kind": "patient", "patient": "p7", "parts": {"train": ["e0"], "test": ["e1"]}}]
    assert flags(found) == {"e0": ["leak"], "e1": ["leak"]}


def test_a_known_patient_goes_before_a_guess(sound: dict[str, PairImages]) -> None:
    eyes = {"e0": "p7_OD", "e1": "p7-OS", "e2": "p8_OD"}
    patients = {"e0": "one", "e1": "two", "e2": "two"}
    pairs = (
        (replace(pair, patient=patients[pair.name]), images)
        for pair, images in checked({name: sound[name] for name in eyes}, eyes)
    )
    found = survey(pairs, split={"train": ["e0", "e1"], "test": ["e2"]})
    assert [pair["patient"] for pair in found["pairs"]] == ["one", "two", "two"]
    assert found["summary"]["patients"] == 2
    assert [leak["patient"] for leak in found["leaks"]] == ["two"]


@pytest.mark.parametrize(
    ("eye", "patient"),
    [
        ("p1_OD", "p1"),
        ("p1-os", "p1"),
        ("p1 left", "p1"),
        ("0012R", "0012"),
        ("OD", "OD"),
        ("carol", "carol"),
        ("m1", "m1"),
    ],
)
def test_patients_by_their_eyes(eye: str, patient: str) -> None:
    assert patient_of(eye) == patient
