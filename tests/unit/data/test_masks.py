"""Vessel masks that come with a data set: found in every layout, checked, kept, and moved with their pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cffa_core.data.ingest import check, write
from cffa_core.data.pairs import dihedral, load_pairs
from cffa_core.data.phantom import make_phantom, write_phantoms
from cffa_core.errors import CorruptArtifact, InvalidDataset
from cffa_core.rng import derive_seed
from tests.raw_pairs import encode, pair_files, write_folder, write_zip


def mask_of(seed: int, size: int = 96) -> np.ndarray:
    """A few thick lines, (H, W) u8 of 0 and 255."""
    random = np.random.default_rng(seed)
    mask = np.zeros((size, size), np.uint8)
    for place in random.integers(10, size - 10, 4):
        mask[place : place + 4] = 255
    return mask


def with_masks(n: int = 3, folder: str = "masks/vessel") -> dict[str, bytes]:
    return {**pair_files(n), **{f"{folder}/p{i}.png": encode(mask_of(i)) for i in range(n)}}


@pytest.mark.parametrize("folder", ["masks/vessel", "masks/vessels"])
@pytest.mark.parametrize("wrapper", ["", "study/"])
def test_masks_are_found_and_kept(tmp_path: Path, folder: str, wrapper: str) -> None:
    files = {f"{wrapper}{name}": data for name, data in with_masks(folder=folder).items()}
    checked = check(write_zip(tmp_path / "set.zip", files))
    assert checked.ok and checked.warnings == ()
    assert [pair.masks for pair in checked.pairs] == [("vessel",)] * 3
    index = write(checked, tmp_path / "checked")
    assert [entry["masks"] for entry in index["pairs"]] == [{"vessel": f"masks/vessel/p{i}.png"} for i in range(3)]
    for i, pair in enumerate(load_pairs(tmp_path / "checked", 96)):
        assert np.array_equal(pair.masks["vessel"].numpy(), mask_of(i) > 0)
        with Image.open(tmp_path / f"checked/masks/vessel/p{i}.png") as stored:
            assert stored.mode == "L" and np.array_equal(np.asarray(stored), mask_of(i))


def test_masks_of_cases_and_of_a_pair_list(tmp_path: Path) -> None:
    files = with_masks()
    cases, listed = {}, dict(files)
    for name, data in files.items():
        folder, file = name.rsplit("/", 1)
        stem = file.removesuffix(".png")
        which = {"cf": "01", "fa": "02"}.get(folder)
        cases[f"{stem}/{stem}_{which}.png" if which else name] = data
    listed["pairs.csv"] = "\n".join(["cf_path,fa_path", *(f"cf/p{i}.png,fa/p{i}.png" for i in range(3))]).encode()
    plain = check(write_folder(tmp_path / "plain", files))
    for layout, found in (("cases", cases), ("csv", listed)):
        checked = check(write_folder(tmp_path / layout, found))
        assert (checked.layout, checked.problems, checked.warnings) == (layout, (), ())
        assert checked.digest == plain.digest


def test_the_digest_knows_masks_and_is_what_it_was_without(tmp_path: Path) -> None:
    digests = {}
    for name, files in {
        "none": pair_files(2),
        "sketch": {**pair_files(2), "masks/My sketch/p0.png": b"not looked at"},
        "disc": {**pair_files(2), "masks/disc/p0.png": encode(mask_of(3))},
        "vessel": with_masks(2),
        "other": {**with_masks(2), "masks/vessel/p1.png": encode(mask_of(9))},
    }.items():
        folder = write_folder(tmp_path / name, files)
        digests[name] = check(folder).digest
        write(check(folder), tmp_path / f"{name}-checked")
        assert load_pairs(tmp_path / f"{name}-checked", 96).digest == load_pairs(folder, 96).digest == digests[name]
    assert digests["none"] == digests["sketch"]
    assert len(set(digests.values())) == 4
    assert "masks" not in json.loads((tmp_path / "none-checked/dataset.json").read_text())["pairs"][0]
    assert not (tmp_path / "none-checked/masks").exists()


RED = np.zeros((96, 96, 3), np.uint8)
RED[30:60, :, 0] = 255
BAD = {
    "mask_size": encode(mask_of(0, 64)),
    "empty_mask": encode(np.full((96, 96), 1, np.uint8)),
    "bad_mask": encode(RED),
    "not_an_image": b"nothing",
}


@pytest.mark.parametrize("code", BAD)
def test_a_bad_mask_is_named_and_nothing_is_taken_in(tmp_path: Path, code: str) -> None:
    checked = check(write_folder(tmp_path / "set", {**with_masks(), "masks/vessel/p1.png": BAD[code]}))
    assert [(problem.pointer, problem.code) for problem in checked.problems] == [("masks/vessel/p1.png", code)]
    with pytest.raises(InvalidDataset):
        write(checked, tmp_path / "checked")
    assert not (tmp_path / "checked").exists()


def test_masks_for_some_pairs_only(tmp_path: Path) -> None:
    files = with_masks()
    del files["masks/vessel/p1.png"]
    files["masks/vessel/q7.png"] = encode(mask_of(7))
    checked = check(write_folder(tmp_path / "set", files))
    assert [(problem.pointer, problem.code) for problem in checked.problems] == [
        ("masks/vessel/p1.png", "missing_mask")
    ]
    assert [(warning.pointer, warning.code) for warning in checked.warnings] == [("masks/vessel/q7.png", "ignored")]


def test_two_masks_for_one_pair(tmp_path: Path) -> None:
    checked = check(write_folder(tmp_path / "set", {**with_masks(), "masks/vessels/p1.png": encode(mask_of(8))}))
    assert {(problem.pointer, problem.code) for problem in checked.problems} == {
        ("masks/vessel/p1.png", "duplicate_name"),
        ("masks/vessels/p1.png", "duplicate_name"),
    }


def test_a_grey_mask_stored_in_colour_and_one_bit_masks_are_taken(tmp_path: Path) -> None:
    files = with_masks(2)
    files["masks/vessel/p0.png"] = encode(np.repeat(mask_of(0)[..., None], 3, axis=2))
    files["masks/vessel/p1.png"] = encode(Image.fromarray(mask_of(1)).convert("1"))
    checked = check(write_folder(tmp_path / "set", files))
    assert checked.digest == check(write_folder(tmp_path / "plain", with_masks(2))).digest


def test_a_mask_moves_with_its_pair(tmp_path: Path) -> None:
    """Padding, resizing, cropping and turning do to a mask what they do to the picture it was drawn on."""
    files = {}
    for i in range(2):
        mask = np.zeros((64, 96), np.uint8)
        mask[20:40, 30:70] = 255
        cf = np.where(mask[..., None] > 0, [250, 40, 40], [90, 90, 90]).astype(np.uint8)
        cf[:4] = 0
        fa = np.full((64, 96), 120, np.uint8)
        files |= {f"cf/p{i}.png": encode(cf), f"fa/p{i}.png": encode(fa), f"masks/vessel/p{i}.png": encode(mask)}
    folder = write_folder(tmp_path / "set", files)
    for resolution, crop in ((96, False), (48, False), (192, False), (96, True)):
        pair = load_pairs(folder, resolution, crop_to_common=crop)[0]
        red = (pair.cf[0] > 0.4) & (pair.cf[1] < 0)
        assert pair.masks["vessel"].shape == (resolution, resolution)
        assert (pair.masks["vessel"] ^ red).float().mean() < 0.02
    for k in range(8):
        turned = dihedral(pair, k)
        assert (turned.masks["vessel"] ^ ((turned.cf[0] > 0.4) & (turned.cf[1] < 0))).float().mean() < 0.02
        assert turned.masks["vessel"].is_contiguous()


def test_a_phantom_folder_brings_its_vessels(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "set", 2, seed=1, resolution=64, processes=1)
    for index, pair in enumerate(load_pairs(tmp_path / "set", 64)):
        assert set(pair.masks) == {"vessel"}
        true = make_phantom(derive_seed(1, "phantom", index), 64).masks["vessel"]
        assert torch.equal(pair.masks["vessel"], torch.from_numpy(true))


def test_a_damaged_checked_mask_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "checked"
    write(check(write_folder(tmp_path / "set", with_masks(2))), folder)
    (folder / "masks/vessel/p0.png").write_bytes(encode(mask_of(0, 64)))
    with pytest.raises(CorruptArtifact, match=r"p0\.png is not the 96x96 image"):
        load_pairs(folder, 96)
    (folder / "masks/vessel/p0.png").unlink()
    with pytest.raises(CorruptArtifact, match="cannot be read"):
        load_pairs(folder, 96)
    text = (folder / "dataset.json").read_text().replace('"vessel": "masks', '"../x": "masks')
    (folder / "dataset.json").write_text(text)
    with pytest.raises(CorruptArtifact, match="unknown masks"):
        load_pairs(folder, 96)


def test_other_masks_come_where_they_are_and_are_kept_on_request(tmp_path: Path) -> None:
    files = with_masks(3)
    files |= {"masks/disc/p0.png": encode(mask_of(5)), "masks/disc/p2.jpg": encode(mask_of(6))}
    files |= {"masks/lesion/p1.png": encode(np.zeros((96, 96), np.uint8)), "masks/disc/q9.png": encode(mask_of(7))}
    checked = check(write_folder(tmp_path / "set", files))
    assert checked.ok, checked.problems
    assert [pair.masks for pair in checked.pairs] == [("disc", "vessel"), ("lesion", "vessel"), ("disc", "vessel")]
    assert [(warning.pointer, warning.code) for warning in checked.warnings] == [("masks/disc/q9.png", "ignored")]
    write(checked, tmp_path / "checked")
    for folder in (tmp_path / "set", tmp_path / "checked"):
        kept = load_pairs(folder, 96, masks=None)
        assert [sorted(pair.masks) for pair in kept] == [["disc", "vessel"], ["lesion", "vessel"], ["disc", "vessel"]]
        assert np.array_equal(kept[0].masks["disc"].numpy(), mask_of(5) > 0) and not kept[1].masks["lesion"].any()
        assert [sorted(pair.masks) for pair in load_pairs(folder, 96)] == [["vessel"]] * 3
        assert [sorted(pair.masks) for pair in load_pairs(folder, 96, masks=["disc"])] == [["disc"], [], ["disc"]]
    bad = {"masks/disc/p0.png": encode(mask_of(0, 64)), "masks/lesion/p1.png": b"nothing", "masks/disc/p2.png": b""}
    found = check(write_folder(tmp_path / "bad", files | bad)).problems
    twice = {(f"masks/disc/p2.{ending}", "duplicate_name") for ending in ("png", "jpg")}
    expected = {("masks/disc/p0.png", "mask_size"), ("masks/lesion/p1.png", "not_an_image"), *twice}
    assert {(problem.pointer, problem.code) for problem in found} >= expected
