"""Archives of edited pairs: the mask and the sheet stand behind CF and FA, are checked as they are, and exported."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cffa_core.errors import CorruptArtifact, InvalidSpec
from cffa_core.jobs.spec import EditSettings, ExportForm, ExportSettings
from cffa_core.recipes.archive import merge_archives, verify_archive, write_part_archive
from cffa_core.recipes.export_archive import export_archive
from cffa_core.recipes.provenance import edit_provenance
from tests.api.driving import png, sha256
from tests.generated_parts import write_part

HEADER = edit_provenance(
    EditSettings(count=4),
    base="tiny",
    model_digest=None,
    dataset_digest=None,
    numerics_key="cpu/x/torch-2.13/diffusers-0.42/fp32",
    source={"dataset": "ab" * 32},
)


def edited_part(folder: Path, indices: range) -> Path:
    """A part of edited pairs: generated ones with two images more."""
    part = json.loads((write_part(folder, indices) / "part.json").read_text())
    for pair in part["pairs"]:
        for extra in ("mask", "sheet"):
            data, name = png(pair["index"], colour=extra == "sheet"), f"{extra}/{pair['index']:06d}.png"
            (folder / extra).mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
            pair[extra] = {"name": name, "size": len(data), "sha256": sha256(data)}
        pair["mask_share"] = 0.25
    (folder / "part.json").write_text(json.dumps(part))
    return folder


def changed(folder: Path, **of_the_first: Any) -> None:
    """Other fields of the first pair of a part."""
    part = json.loads((folder / "part.json").read_text())
    part["pairs"][0] |= of_the_first
    (folder / "part.json").write_text(json.dumps(part))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """The archive of four pairs in two parts."""
    zips = []
    for number, indices in enumerate((range(2), range(2, 4))):
        zips.append(tmp_path / f"{number}.zip")
        write_part_archive(edited_part(tmp_path / f"part{number}", indices), zips[-1], HEADER)
    merge_archives(zips, tmp_path / "whole.zip", HEADER)
    return tmp_path / "whole.zip"


def test_all_four_images_of_a_pair_stand_together(whole: Path) -> None:
    with zipfile.ZipFile(whole) as archive:
        names = archive.namelist()
        assert archive.read("mask/000003.png") == png(3, colour=False)
    assert names[4:8] == ["cf/000001.png", "fa/000001.png", "mask/000001.png", "sheet/000001.png"]
    manifest = verify_archive(whole)
    assert len(names) == 4 * 4 + 1 and manifest["edited"] is True and manifest["source"] == {"dataset": "ab" * 32}
    assert (manifest["base"], manifest["versions"]["torch"]) == ("tiny", "2.13")
    assert all(set(pair["sheet"]) == {"name", "size", "sha256"} for pair in manifest["pairs"])
    assert [pair["mask_share"] for pair in manifest["pairs"]] == [0.25] * 4


def test_a_mask_that_is_not_what_the_part_says_is_refused(tmp_path: Path) -> None:
    folder = edited_part(tmp_path / "part", range(2))
    (folder / "mask/000001.png").write_bytes(png(9))
    with pytest.raises(CorruptArtifact, match=r"mask/000001\.png"):
        write_part_archive(folder, tmp_path / "pairs.zip")
    assert not (tmp_path / "pairs.zip").exists()


@pytest.mark.parametrize("name", ["mask/000001.png", "masks/000000.png", "cf/000000.png"])
def test_a_mask_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    folder = edited_part(tmp_path / "part", range(1))
    changed(folder, mask={"name": name, "size": 1, "sha256": "ab" * 32})
    with pytest.raises(CorruptArtifact, match="not the name of pair 0"):
        write_part_archive(folder, tmp_path / "pairs.zip")


def test_a_flipped_bit_in_a_sheet_is_found(whole: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[data.index(png(2)) + 60] ^= 1
    whole.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match=r"sheet/000002\.png"):
        verify_archive(whole)


def with_source(tmp_path: Path, source: object) -> Path:
    """An archive of two edited pairs of another source."""
    folder = edited_part(tmp_path / "other", range(2))
    write_part_archive(folder, tmp_path / "other.zip", {**HEADER, "source": source})
    return tmp_path / "other.zip"


@pytest.mark.parametrize("source", [{"dataset": "ab" * 32}, {"edit": "ab" * 32}, "pairs/", None])
def test_what_may_show_a_patient_is_not_exported_as_dicom(tmp_path: Path, source: object) -> None:
    archive = with_source(tmp_path, source)
    with pytest.raises(InvalidSpec, match="patient") as refused:
        export_archive(archive, tmp_path / "out", ExportSettings(form="dicom"))
    assert [(problem.pointer, problem.code) for problem in refused.value.problems] == [("/form", "not_synthetic")]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["zip", "webdataset", "dicom"])
def test_an_export_takes_masks_along_and_leaves_sheets(whole: Path, tmp_path: Path, form: ExportForm) -> None:
    whole = with_source(tmp_path, {"generation": "ab" * 32}) if form == "dicom" else whole
    export_archive(whole, tmp_path / "out", ExportSettings(form=form))
    (path,) = sorted(set((tmp_path / "out").iterdir()) - {tmp_path / "out" / "manifest.json"})
    if form == "webdataset":
        with tarfile.open(path) as tar:
            names = tar.getnames()
    else:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    masks = {"zip": "mask/000003.png", "webdataset": "000003.mask.png"}
    assert not any("sheet" in name for name in names)
    assert (masks.get(form, "") in names) is (form != "dicom")
    if form == "zip":
        assert ["mask" in pair for pair in verify_archive(path)["pairs"]] == [True] * 4
