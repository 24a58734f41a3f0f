"""Exports of an archive: every form reads back, the same bytes twice, selections, and what is refused."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
import pytest
import webdataset

from cffa_core.errors import CffaError, Conflict, CorruptArtifact, InvalidDataset, InvalidSpec, NotFound
from cffa_core.jobs.spec import ExportSettings
from cffa_core.recipes.archive import verify_archive
from cffa_core.recipes.export_archive import export_archive
from tests.generated_parts import HEADER, pixels, write_archive

COUNT = 10
# webdataset leaves its streams to the garbage collector.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::ResourceWarning")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"), COUNT)


def settings(form: str = "zip", shard_size: int = 1000, **selection: Any) -> ExportSettings:
    return ExportSettings.model_validate({"form": form, "shard_size": shard_size, "selection": selection})


def exported(archive: Path, out: Path, wanted: ExportSettings) -> list[int]:
    """Indices of the pairs in a zip export."""
    export_archive(archive, out, wanted)
    return [pair["index"] for file in sorted(out.glob("*.zip")) for pair in verify_archive(file)["pairs"]]


def test_zip_shards_are_archives_of_pairs(archive: Path, tmp_path: Path) -> None:
    files = export_archive(archive, tmp_path / "out", settings(shard_size=4))
    assert [(file["name"], file["pairs"]) for file in files] == [
        ("pairs-000000.zip", 4),
        ("pairs-000001.zip", 4),
        ("pairs-000002.zip", 2),
    ]
    whole = verify_archive(archive)
    for number, file in enumerate(files):
        path = tmp_path / "out" / file["name"]
        assert (path.stat().st_size, digest(path)) == (file["size"], file["sha256"])
        manifest = verify_archive(path)
        assert manifest["pairs"] == whole["pairs"][4 * number : 4 * number + 4]
        assert {key: manifest[key] for key in HEADER} == HEADER
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["format"], manifest["files"], manifest["pairs"]) == ("cffa-export/1", files, COUNT)
    assert manifest["model_digest"] == HEADER["model_digest"] and manifest["export"]["shard_size"] == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def read_shards(urls: str, *decode: str) -> list[dict[str, Any]]:
    """All samples, decoded or not; what the library opened is closed afterwards."""
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    samples = list(dataset.decode(*decode) if decode else dataset)
    del dataset
    gc.collect()
    return samples


@LEFT_OPEN
def test_webdataset_reads_its_shards(archive: Path, tmp_path: Path) -> None:
    export_archive(archive, tmp_path / "out", settings("webdataset", 6))
    urls = str(tmp_path / "out" / "pairs-{000000..000001}.tar")
    samples = read_shards(urls)
    assert [sample["__key__"] for sample in samples] == [f"{index:06d}" for index in range(COUNT)]
    with zipfile.ZipFile(archive) as source:
        for sample in samples:
            # The very files, with what is written into them.
            assert sample["cf.png"] == source.read(f"cf/{sample['__key__']}.png")
            assert sample["fa.png"] == source.read(f"fa/{sample['__key__']}.png")
    told = json.loads(samples[7]["json"])
    assert (told["index"], told["try"], told["synthetic"]) == (7, 0, True)
    assert told["alignment"]["ridge_correlation"] == 0.7 and told["novelty"]["nearest"] == "p3"
    assert {key: told[key] for key in HEADER} == HEADER
    assert told["cf"].keys() == {"name", "sha256", "size"}


@LEFT_OPEN
def test_decoded_by_webdataset_the_pixels_are_those(archive: Path, tmp_path: Path) -> None:
    export_archive(archive, tmp_path / "out", settings("webdataset", first=3, last=3))
    (sample,) = read_shards(str(tmp_path / "out" / "pairs-000000.tar"), "rgb8")
    assert (sample["cf.png"] == pixels("cf", 3)).all()
    assert (sample["fa.png"] == pixels("fa", 3)[..., None]).all()
    assert sample["json"]["index"] == 3


def test_dicom_files_have_the_same_pixels(archive: Path, tmp_path: Path) -> None:
    export_archive(archive, tmp_path / "out", settings("dicom", 6))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "dicom-000000.zip",
        "dicom-000001.zip",
        "manifest.json",
    ]
    studies = set()
    with zipfile.ZipFile(tmp_path / "out" / "dicom-000001.zip") as found:
        assert found.namelist() == [f"{i:06d}/{m}.dcm" for i in range(6, 10) for m in ("cf", "fa")]
        for name in found.namelist():
            index, modality = int(name[:6]), name[7:9]
            read = pydicom.dcmread(io.BytesIO(found.read(name)))
            assert np.array_equal(read.pixel_array, pixels(modality, index))
            studies.add((index, read.StudyInstanceUID, read.FrameOfReferenceUID, read.PatientID))
    assert len(studies) == 4


@pytest.mark.parametrize("form", ["zip", "webdataset", "dicom"])
def test_the_same_archive_gives_the_same_bytes(archive: Path, tmp_path: Path, form: str) -> None:
    wanted = settings(form, 3, first=2)
    first = export_archive(archive, tmp_path / "one", wanted)
    with zipfile.ZipFile(archive) as source:
        source.extractall(tmp_path / "unpacked")
    assert export_archive(tmp_path / "unpacked", tmp_path / "two", wanted) == first
    one, two = (
        {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())} for name in ("one", "two")
    )
    assert one == two
    assert not any(str(tmp_path).encode() in data for data in one.values())


@pytest.mark.parametrize(
    ("selection", "indices"),
    [
        ({}, list(range(COUNT))),
        ({"first": 7}, [7, 8, 9]),
        ({"first": 2, "last": 4}, [2, 3, 4]),
        ({"indices": [9, 1]}, [1, 9]),
        ({"min_alignment": 0.8}, [8, 9]),
        ({"max_similarity_to_training": 0.25}, [8, 9]),
        ({"indices": [1, 5, 9], "min_alignment": 0.5, "last": 8}, [5]),
    ],
)
def test_a_selection_takes_what_it_says(
    archive: Path, tmp_path: Path, selection: dict[str, Any], indices: list[int]
) -> None:
    assert exported(archive, tmp_path / "out", settings(**selection)) == indices


def test_pairs_that_could_not_be_scored_do_not_reach_a_least_score(tmp_path: Path) -> None:
    archive = write_archive(tmp_path, 2)
    blank_alignment(archive)
    assert exported(archive, tmp_path / "out", settings(min_alignment=-1)) == [1]


def blank_alignment(archive: Path) -> None:
    """Say of pair 0 that too little of it is seen in common to be scored."""
    with zipfile.ZipFile(archive) as source:
        members = {name: source.read(name) for name in source.namelist()}
    manifest = json.loads(members["manifest.json"])
    manifest["pairs"][0]["alignment"] = None
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(archive, "w") as target:
        for name, data in members.items():
            target.writestr(name, data)


def test_only_accepted_pairs_needs_a_gate(tmp_path: Path) -> None:
    gated = {"count": 4, "gate": {"min_alignment": 0.1, "max_tries": 8}}
    archive = write_archive(tmp_path, 4, spec=gated)
    assert exported(archive, tmp_path / "out", settings(accepted_only=True)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("scored", "selection", "pointer", "code"),
    [
        (True, {"min_alignment": 2.0}, "/selection", "nothing_selected"),
        (True, {"accepted_only": True}, "/selection/accepted_only", "no_gate"),
        (False, {"min_alignment": 0.1}, "/selection/min_alignment", "not_recorded"),
        (False, {"max_similarity_to_training": 0.5}, "/selection/max_similarity_to_training", "not_recorded"),
    ],
)
def test_what_cannot_be_selected_is_refused_and_leaves_nothing(
    tmp_path: Path, scored: bool, selection: dict[str, Any], pointer: str, code: str
) -> None:
    archive = write_archive(tmp_path / "source", 2, scored=scored)
    with pytest.raises(InvalidSpec) as refused:
        export_archive(archive, tmp_path / "out", settings(**selection))
    assert [(problem.pointer, problem.code) for problem in refused.value.problems] == [(pointer, code)]
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("form", ["zip", "webdataset", "dicom"])
def test_a_changed_image_is_not_passed_on(archive: Path, tmp_path: Path, form: str) -> None:
    with zipfile.ZipFile(archive) as source:
        source.extractall(tmp_path / "unpacked")
    path = tmp_path / "unpacked" / "fa" / "000005.png"
    path.write_bytes(cv2.imencode(".png", pixels("fa", 99))[1].tobytes())
    with pytest.raises(CorruptArtifact, match=r"fa/000005\.png does not have the recorded"):
        export_archive(tmp_path / "unpacked", tmp_path / "out", settings(form))
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]


def test_images_that_are_no_pngs_are_refused_as_dicom(tmp_path: Path) -> None:
    write_archive(tmp_path / "source", 1)
    with zipfile.ZipFile(tmp_path / "source" / "archive.zip") as source:
        source.extractall(tmp_path / "unpacked")
    manifest = json.loads((tmp_path / "unpacked" / "manifest.json").read_text())
    entry = manifest["pairs"][0]["cf"]
    (tmp_path / "unpacked" / entry["name"]).write_bytes(b"not a PNG")
    entry |= {"size": 9, "sha256": hashlib.sha256(b"not a PNG").hexdigest()}
    (tmp_path / "unpacked" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptArtifact, match=r"cf/000000\.png is not a readable PNG"):
        export_archive(tmp_path / "unpacked", tmp_path / "out", settings("dicom"))


def without_manifest(folder: Path) -> Path:
    (folder / "cf").mkdir(parents=True)
    return folder


def foreign_zip(folder: Path) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("manifest.json", json.dumps({"format": "other/1", "pairs": []}))
    return folder / "a.zip"


def no_zip(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.zip").write_bytes(b"nothing")
    return folder / "a.zip"


def hostile_name(folder: Path) -> Path:
    folder.mkdir()
    entry = {"name": "../../secret", "size": 1, "sha256": "0" * 64}
    pairs = [{"index": 0, "cf": entry, "fa": entry}]
    (folder / "manifest.json").write_text(json.dumps({"format": "cffa-archive/2", "pairs": pairs}))
    return folder


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (lambda folder: folder, NotFound),
        (without_manifest, InvalidDataset),
        (foreign_zip, CorruptArtifact),
        (no_zip, CorruptArtifact),
        (hostile_name, CorruptArtifact),
    ],
)
def test_what_is_no_archive_of_pairs_is_refused(tmp_path: Path, source: Any, error: type[CffaError]) -> None:
    with pytest.raises(error):
        export_archive(source(tmp_path / "source"), tmp_path / "out", settings())
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_nothing_is_written_over(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(Conflict, match="nothing is written over"):
        export_archive(archive, tmp_path, settings())
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
