"""Export of pairs: what goes out comes back with equal pixels, bytes repeat, and nothing half-made is left."""

from __future__ import annotations

import csv
import gc
import hashlib
import json
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from cffa_core.data import ingest
from cffa_core.data.export import ExportFormat, export_pairs
from cffa_core.data.ingest import open_pairs
from cffa_core.errors import Conflict, CorruptArtifact, InvalidDataset, InvalidSpec, NotFound, StorageUnavailable
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder, write_zip

FORMATS: tuple[ExportFormat, ...] = ("folder", "zip", "webdataset", "imagefolder")


def annotated(n: int = 3, size: int = 96) -> dict[str, bytes]:
    """Pairs of two eyes, all with vessel masks, and all but the last with a mask of the disc."""
    files = pair_files(n, size)
    for index in range(n):
        files[f"masks/vessel/p{index}.png"] = encode(np.tri(size, k=index, dtype=np.uint8) * 255)
        files[f"masks/disc/p{index}.png"] = encode(np.tri(size, k=-index, dtype=np.uint8) * 255)
    files.pop(f"masks/disc/p{n - 1}.png")
    rows = "".join(f"p{index},eye{index % 2}\n" for index in range(n))
    return files | {"eyes.csv": f"name,eye\n{rows}".encode()}


def archive_of(files: dict[str, bytes], path: Path) -> Path:
    """An archive of generated pairs as the service makes it (docs/api.md), written by hand."""
    pairs = []
    members: dict[str, bytes] = {}
    names = sorted(name.removeprefix("cf/") for name in files if name.startswith("cf/"))
    for index, name in enumerate(names):
        pair: dict[str, Any] = {"index": index, "seed": 1000 + index, "fa_chroma": 0.0}
        for modality in ("cf", "fa"):
            data = files[f"{modality}/{name}"]
            member = f"{modality}/{index:06d}.png"
            members[member] = data
            pair[modality] = {"name": member, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        pairs.append(pair)
    header = {"spec": {"seed": 42, "count": len(pairs)}, "model_digest": "ab" * 32, "numerics_key": "cpu/x"}
    members["manifest.json"] = json.dumps({"format": "cffa-archive/1", **header, "pairs": pairs}).encode()
    return write_zip(path, members)


def pixels(path: Path) -> dict[str, tuple[str, list[np.ndarray]]]:
    """Eye and the four arrays of each pair, as our reader gives them."""
    _, _, decoded = open_pairs(path)
    return {pair.name: (pair.eye, [im.cf, im.fa, im.valid_cf, im.valid_fa, *im.masks.values()]) for pair, im in decoded}


def same(a: dict[str, tuple[str, list[np.ndarray]]], b: dict[str, tuple[str, list[np.ndarray]]]) -> bool:
    return a.keys() == b.keys() and all(
        a[name][0] == b[name][0]
        and len(a[name][1]) == len(b[name][1])
        and all(map(np.array_equal, a[name][1], b[name][1]))
        for name in a
    )


def tree(path: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {file.relative_to(path).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_goes_out_comes_back(tmp_path: Path, kind: ExportFormat) -> None:
    source = write_folder(tmp_path / "source", annotated())
    report = export_pairs(source, tmp_path / "out", kind)
    assert same(pixels(source), pixels(tmp_path / "out"))
    assert open_pairs(source)[0] == open_pairs(tmp_path / "out")[0] == report["digest"]
    assert (report["pairs"], report["eyes"], report["masks"]) == (3, 2, {"disc": 2, "vessel": 3})
    # Out and in a second time, in the other form: masks, eyes and bytes stay.
    export_pairs(tmp_path / "out", tmp_path / "again", kind)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


def test_the_files_of_a_folder(tmp_path: Path) -> None:
    export_pairs(write_folder(tmp_path / "source", annotated()), tmp_path / "out", "folder", licence="CC-BY-4.0")
    cf, fa = draw_pair(1, 96)
    stored = cv2.cvtColor(cv2.imread(str(tmp_path / "out/cf/p1.png"), cv2.IMREAD_UNCHANGED), cv2.COLOR_BGR2RGB)
    assert np.array_equal(stored, cf)
    assert np.array_equal(cv2.imread(str(tmp_path / "out/fa/p1.png"), cv2.IMREAD_UNCHANGED), fa)
    for token, k in (("vessel", 1), ("disc", -1)):
        mask = cv2.imread(str(tmp_path / f"out/masks/{token}/p1.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(mask, np.tri(96, k=k, dtype=np.uint8) * 255)
    assert not (tmp_path / "out/masks/disc/p2.png").exists()
    with (tmp_path / "out/eyes.csv").open() as table:
        assert list(csv.reader(table)) == [["name", "eye"], ["p0", "eye0"], ["p1", "eye1"], ["p2", "eye0"]]
    card = (tmp_path / "out/README.md").read_text()
    assert 'license: "CC-BY-4.0"' in card and "3 of 96x96" in card and "disc (2 pairs), vessel (3 pairs)" in card


@pytest.mark.parametrize("kind", FORMATS)
def test_equal_pairs_give_equal_bytes(tmp_path: Path, kind: ExportFormat) -> None:
    folder = write_folder(tmp_path / "source", annotated())
    packed = write_zip(tmp_path / "source.zip", annotated())
    export_pairs(folder, tmp_path / "a", kind, shard_pairs=2)
    export_pairs(packed, tmp_path / "b", kind, shard_pairs=2)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_licence_is_never_invented(tmp_path: Path) -> None:
    export_pairs(write_folder(tmp_path / "source", pair_files(2)), tmp_path / "out", "folder")
    card = (tmp_path / "out/README.md").read_text()
    assert "license:" not in card and "Licence: not stated" in card and "Origin\n\nNot stated" in card
    assert "license" not in json.loads((tmp_path / "out/croissant.json").read_text())


@pytest.mark.parametrize("kind", FORMATS)
def test_generated_pairs_say_where_they_come_from(tmp_path: Path, kind: ExportFormat) -> None:
    archive = archive_of(pair_files(2), tmp_path / "pairs.zip")
    report = export_pairs(archive, tmp_path / "out", kind)
    expected = {
        "kind": "generated",
        "model_digest": "ab" * 32,
        "numerics_key": "cpu/x",
        "spec": {"seed": 42, "count": 2},
    }
    assert report["origin"] == expected
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "out") as opened:
            opened.extractall(tmp_path / "unpacked")
    place = tmp_path / ("unpacked" if kind == "zip" else "out")
    card = (place / "README.md").read_text()
    assert "ab" * 32 in card and "Seed of the whole set: 42" in card and "no patient" in card
    index = json.loads((place / ("dataset.json" if kind in ("folder", "zip") else "pairs.json")).read_text())
    assert [(entry["name"], entry["seed"]) for entry in index["pairs"]] == [("000000", 1000), ("000001", 1001)]
    if kind in ("folder", "zip"):  # exported once more, the origin stays
        again = export_pairs(tmp_path / "out", tmp_path / "again", kind)
        assert again["origin"] == expected
        assert tree(tmp_path / "again") == tree(tmp_path / "out")


def test_an_origin_may_be_stated_but_not_against_the_record(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", pair_files(2))
    assert export_pairs(source, tmp_path / "real", "folder", origin="real")["origin"] == {"kind": "real"}
    assert "of real eyes" in (tmp_path / "real/README.md").read_text()
    archive = archive_of(pair_files(2), tmp_path / "pairs.zip")
    with pytest.raises(InvalidSpec, match="recorded as generated, not as real"):
        export_pairs(archive, tmp_path / "out", "folder", origin="real")
    with pytest.raises(InvalidSpec, match="recorded as real"):
        export_pairs(tmp_path / "real", tmp_path / "out", "folder", origin="procedural")


def test_a_manifest_is_believed_only_where_it_fits(tmp_path: Path) -> None:
    archive = archive_of(pair_files(3), tmp_path / "pairs.zip")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    first, second = tmp_path / "unpacked/cf/000000.png", tmp_path / "unpacked/cf/000001.png"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptArtifact, match=r"cf/000000\.png is not the image"):
        export_pairs(tmp_path / "unpacked", tmp_path / "out", "folder")
    first.write_bytes(kept)
    (tmp_path / "unpacked/cf/real.png").write_bytes(kept)
    (tmp_path / "unpacked/fa/real.png").write_bytes((tmp_path / "unpacked/fa/000000.png").read_bytes())
    with pytest.raises(CorruptArtifact, match="does not name real"):
        export_pairs(tmp_path / "unpacked", tmp_path / "out", "zip")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.zip", "unpacked"]


@pytest.mark.parametrize("kind", FORMATS)
def test_bad_masks_are_named_and_nothing_is_left(tmp_path: Path, kind: ExportFormat) -> None:
    files = annotated() | {"masks/disc/p1.png": encode(np.ones((64, 64), np.uint8)), "masks/cup/p1.png": b"no picture"}
    with pytest.raises(InvalidDataset) as caught:
        export_pairs(write_folder(tmp_path / "source", files), tmp_path / "out", kind)
    found = {(problem.pointer, problem.code) for problem in caught.value.problems}
    assert found == {("masks/disc/p1.png", "mask_size"), ("masks/cup/p1.png", "not_an_image")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_masks_of_no_pair_are_told(tmp_path: Path) -> None:
    files = annotated() | {"masks/disc/other.png": encode(np.zeros((96, 96), np.uint8))}
    report = export_pairs(write_folder(tmp_path / "source", files), tmp_path / "out", "folder")
    assert report["masks_left_out"] == ["masks/disc/other.png"]


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        export_pairs(tmp_path / "absent", tmp_path / "out", "folder")
    files = pair_files(3)
    files.pop("fa/p1.png")
    source = write_folder(tmp_path / "source", files)
    with pytest.raises(InvalidDataset) as caught:
        export_pairs(source, tmp_path / "out", "folder")
    assert [problem.code for problem in caught.value.problems] == ["orphan_cf"]
    (source / "cf/p1.png").unlink()
    with pytest.raises(Conflict, match="lies inside"):
        export_pairs(source, source / "out", "folder")
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(Conflict, match="nothing is written over"):
        export_pairs(source, tmp_path / "taken", "zip")
    with pytest.raises(InvalidSpec):
        export_pairs(source, tmp_path / "out", "webdataset", shard_pairs=0)
    for kind, code in (("dicom", "not_synthetic"), ("rar", "unknown")):
        with pytest.raises(InvalidSpec) as refused:
            export_pairs(source, tmp_path / "out", kind)  # type: ignore[arg-type]
        assert [(problem.pointer, problem.code) for problem in refused.value.problems] == [("/format", code)]
    with pytest.raises(StorageUnavailable, match="cannot be written"):
        export_pairs(source, tmp_path / "taken" / "out", "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "taken"]
    assert (tmp_path / "taken").read_text() == "mine"


def test_the_remains_of_a_killed_export_are_cleared(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", pair_files(2))
    (tmp_path / ".out.partial" / "cf").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    export_pairs(source, tmp_path / "out", "folder")
    assert len(list((tmp_path / "out/cf").iterdir())) == 2
    assert not (tmp_path / ".out.partial").exists()


def test_memory_does_not_grow_with_the_number_of_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six times the pairs; a pair of 128 px is 112 kB as arrays, so keeping even half of them would be seen."""
    monkeypatch.setattr(ingest, "KEPT_BYTES", 0)

    def peak(n: int) -> int:
        """The least of three tries: whatever else the process does meanwhile (a thread, a collection) is no part."""
        source = write_folder(tmp_path / f"source{n}", pair_files(n, size=128))
        found = []
        for attempt in range(3):
            gc.collect()
            tracemalloc.start()
            export_pairs(source, tmp_path / f"out{n}-{attempt}", "webdataset", shard_pairs=8)
            found.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        return min(found)

    assert peak(24) - peak(4) < 20 * 112_000 / 4


@pytest.mark.realdata
def test_real_pairs_registered_from_landmarks_come_back(real_data: Path, tmp_path: Path) -> None:
    """What the registration left invalid is valid nowhere after the round trip either."""
    for case in sorted((real_data / "real_unregistered").iterdir())[:3]:
        write_folder(tmp_path / "source", {f"{case.name}/{file.name}": file.read_bytes() for file in case.iterdir()})
    report = export_pairs(tmp_path / "source", tmp_path / "out", "folder", origin="real")
    assert report["registration"] == {"homography": 3}
    assert same(pixels(tmp_path / "source"), pixels(tmp_path / "out"))
