"""The evaluation recipe: sources of any layout in, a report, its JSON and its picture out."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from cffa_core.data.contracts import PairImages
from cffa_core.errors import InvalidDataset, ModelUnavailable
from cffa_core.models.base import load_base
from cffa_core.recipes.evaluate import evaluate_alignment, round_trip, through_vae
from tests.micro_base import write_micro_base
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder, write_zip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_micro_base(tmp_path_factory.mktemp("base"))


def test_a_folder_without_reference(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pair_files(4, size=128))
    told: list[tuple[str, int, int]] = []
    out = tmp_path / "out"
    report = evaluate_alignment(folder, out=out, on_progress=lambda *news: told.append(news))
    assert told == [("pairs", done, 4) for done in (1, 2, 3, 4)]
    content = json.loads((out / "alignment.json").read_text())
    assert content == report.to_dict()
    assert content["pairs"]["source"] == "set"
    assert content["scores"]["ridge_correlation"]["true"]["value"] > 0.8
    assert abs(content["scores"]["ridge_correlation"]["shuffled"]["value"]) < 0.3
    assert cv2.imread(str(out / "alignment.png")).shape[1] == 900


def test_a_generated_archive_against_real_pairs_through_the_vae(tmp_path: Path, base: Path) -> None:
    files = {**pair_files(4, size=128), "manifest.json": b'{"format": "x"}'}
    archive = write_zip(tmp_path / "archive.zip", files)
    real = write_folder(tmp_path / "real", pair_files(5, size=128))
    content = evaluate_alignment(archive, reference=real, base=str(base)).to_dict()
    assert content["pairs"]["pairs"] == 4
    assert content["ceiling"]["pairs"] == 5
    assert content["vae"]["base"] == base.name
    assert 0 <= content["vae"]["vessel_dice"]["cf"]["value"] < 0.6  # random weights keep nothing
    entry = content["scores"]["vessel_dice"]
    assert entry["ceiling"]["value"] < entry["true"]["value"]


def test_a_reference_without_a_base_is_the_ceiling_itself(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pair_files(4, size=128))
    content = evaluate_alignment(folder, reference=folder).to_dict()
    assert content["vae"] is None
    assert content["scores"]["vessel_dice"]["normalised"]["value"] == pytest.approx(1, abs=0.1)


def test_a_base_without_reference_measures_the_pairs_own_round_trip(tmp_path: Path, base: Path) -> None:
    folder = write_folder(tmp_path / "set", pair_files(3, size=128))
    report = evaluate_alignment(folder, base=str(base)).to_dict()
    plain = evaluate_alignment(folder).to_dict()
    assert report["ceiling"] is None
    assert report["vae"]["vessel_dice"]["fa"]["n"] == 3
    assert report["scores"] == plain["scores"]


def test_a_large_set_is_sampled_with_its_seed(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "set", pair_files(5, size=96))
    chosen = [
        tuple(pair["name"] for pair in evaluate_alignment(folder, max_pairs=3, seed=seed).to_dict()["per_pair"])
        for seed in (0, 0, 1, 2, 3)
    ]
    assert {len(names) for names in chosen} == {3}
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_intervals_are_over_patients_where_they_are_known(tmp_path: Path, base: Path) -> None:
    folder = write_folder(tmp_path / "set", pair_files(8, size=96))
    by_eye = evaluate_alignment(folder, base=str(base)).to_dict()
    told = evaluate_alignment(folder, base=str(base), patient_pattern="p([0-3])").to_dict()
    assert (by_eye["pairs"]["eyes"], by_eye["pairs"]["resampled_by"]) == (8, "eye")
    assert (told["pairs"]["eyes"], told["pairs"]["patients"], told["pairs"]["resampled_by"]) == (8, 4, "patient")
    assert told["vae"]["vessel_dice"]["cf"]["patients"] == told["scores"]["ngf"]["true"]["patients"] == 4
    (folder / "eyes.csv").write_text("name,eye,patient\n" + "".join(f"p{i},p{i},{i // 4}\n" for i in range(8)))
    two = evaluate_alignment(folder).to_dict()["scores"]["ngf"]["true"]
    assert (two["n"], two["eyes"], two["patients"], two["low"]) == (8, 8, 2, None)


def test_the_round_trip_keeps_size_masks_and_eyes(base: Path) -> None:
    loaded = load_base(base)
    cf, fa = draw_pair(0, 100)
    valid = np.ones((75, 100), bool)
    images = PairImages(cf[:75], fa[:75], valid, valid)
    (name, eye, after) = next(through_vae([("p", "e", images)], loaded))
    assert (name, eye) == ("p", "e")
    assert after.cf.shape == (75, 100, 3)
    assert after.fa.shape == (75, 100)
    assert after.valid_fa is valid
    assert after.cf.dtype == after.fa.dtype == np.uint8
    np.testing.assert_array_equal(after.cf, round_trip(images.cf, loaded))


def test_bad_sources_and_bases_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset):
        evaluate_alignment(write_folder(tmp_path / "one", pair_files(1)))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(InvalidDataset):
        evaluate_alignment(tmp_path / "empty.zip")
    folder = write_folder(tmp_path / "set", {**pair_files(2), "cf/x.png": encode(draw_pair(1)[0])})
    with pytest.raises(InvalidDataset):
        evaluate_alignment(folder)
    with pytest.raises(ModelUnavailable):
        evaluate_alignment(write_folder(tmp_path / "good", pair_files(2)), base=str(tmp_path / "absent"))
