"""What others' libraries make of an export: `webdataset`, `datasets` and `mlcroissant` read it, without a network."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import mlcroissant
import numpy as np
import pytest
import webdataset
from datasets import load_dataset

from cffa_core.data.export import ExportFormat, export_pairs
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder

# mlcroissant's own dependency calls its own deprecated names.
RDFLIB = pytest.mark.filterwarnings("ignore::DeprecationWarning:rdflib")
# Names that mean something to a reader: the end of a key, a split, digits alone.
NAMES = ("a.b", "test_1", "000007")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pairs with names as above, masks of the disc for two of them."""
    drawn = pair_files(len(NAMES))
    files = {
        f"{m}/{name}.png": drawn[f"{m}/p{index}.png"] for index, name in enumerate(sorted(NAMES)) for m in ("cf", "fa")
    }
    for name in ("a.b", "test_1"):
        files[f"masks/disc/{name}.png"] = encode(np.eye(96, dtype=np.uint8) * 255)
    return write_folder(tmp_path_factory.mktemp("source"), files)


def expected() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: draw_pair(index, 96) for index, name in enumerate(sorted(NAMES))}


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its streams to the garbage collector
def test_webdataset_reads_the_shards(source: Path, tmp_path: Path) -> None:
    export_pairs(source, tmp_path / "out", "webdataset", shard_pairs=2)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert [shard.name for shard in shards] == ["cffa-000000.tar", "cffa-000001.tar"]
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("rgb8"))
    pairs = expected()
    assert [sample["json"]["name"] for sample in samples] == sorted(NAMES)
    assert [sample["__key__"] for sample in samples] == ["000007", "a_b", "test_1"]
    for sample in samples:
        cf, fa = pairs[sample["json"]["name"]]
        assert np.array_equal(sample["cf.png"], cf)
        assert np.array_equal(sample["fa.png"][..., 0], fa)
        assert sample["valid_cf.png"].min() == 255
        assert ("mask_disc.png" in sample) == (sample["json"]["masks"] == ["disc"])
    index = json.loads((tmp_path / "out/pairs.json").read_text())["pairs"]
    assert [(entry["key"], entry["shard"]) for entry in index] == [
        ("000007", "cffa-000000.tar"),
        ("a_b", "cffa-000000.tar"),
        ("test_1", "cffa-000001.tar"),
    ]


@pytest.mark.parametrize("by_folder", [False, True])
def test_datasets_reads_the_image_folder(source: Path, tmp_path: Path, by_folder: bool) -> None:
    export_pairs(source, tmp_path / "out", "imagefolder", licence="cc-by-4.0")
    where: dict[str, Any] = {"path": str(tmp_path / "out")}
    if not by_folder:
        where = {"path": "imagefolder", "data_dir": str(tmp_path / "out")}
    splits = load_dataset(**where, cache_dir=str(tmp_path / "cache"))
    assert list(splits) == ["train"]
    rows = list(splits["train"])
    pairs = expected()
    assert [row["name"] for row in rows] == sorted(NAMES)
    for row in rows:
        cf, fa = pairs[row["name"]]
        assert np.array_equal(np.asarray(row["cf"]), cf)
        assert np.array_equal(np.asarray(row["fa"]), fa)
        assert (row["eye"], row["width"], row["registration"]) == (row["name"], 96, "given")
        assert (row["mask_disc"] is None) == (row["name"] == "000007")
        assert np.asarray(row["fov_fa"]).min() == 255


def opened(source: Path, kind: ExportFormat, folder: Path) -> tuple[Path, dict[str, Any]]:
    """An export as a folder, and its Croissant document."""
    out = folder / kind
    export_pairs(source, out, kind, shard_pairs=2, licence="https://creativecommons.org/licenses/by/4.0/")
    if kind == "zip":
        with zipfile.ZipFile(out) as archive:
            archive.extractall(folder / "unpacked")
        out = folder / "unpacked"
    return out, json.loads((out / "croissant.json").read_text())


@RDFLIB
@pytest.mark.parametrize("kind", ["folder", "zip", "webdataset", "imagefolder"])
def test_croissant_is_valid(source: Path, tmp_path: Path, kind: ExportFormat) -> None:
    place, document = opened(source, kind, tmp_path)
    found = mlcroissant.Dataset(jsonld=str(place / "croissant.json"))
    assert not found.metadata.ctx.issues.errors
    # What is recommended and not known is left out; nothing else may be missing.
    lacking = {warning.split('"')[1].rpartition("/")[2] for warning in found.metadata.ctx.issues.warnings}
    assert lacking <= {"citeAs", "datePublished", "version"}
    for entry in document["distribution"]:
        if entry["@type"] == "cr:FileObject":
            data = (place / entry["contentUrl"]).read_bytes()
            assert hashlib.sha256(data).hexdigest() == entry["sha256"]
    records = list(found.records("pairs"))
    assert [row["pairs/name"].decode() for row in records] == sorted(NAMES)
    assert {row["pairs/width"] for row in records} == {96}


@RDFLIB
@pytest.mark.parametrize(("kind", "key"), [("folder", "name"), ("imagefolder", "fa_file_name")])
def test_croissant_leads_from_an_image_to_its_pair(source: Path, tmp_path: Path, kind: ExportFormat, key: str) -> None:
    place, _ = opened(source, kind, tmp_path)
    found = mlcroissant.Dataset(jsonld=str(place / "croissant.json"))
    names = {row[f"pairs/{key}"]: row["pairs/name"].decode() for row in found.records("pairs")}
    images = {names[row[f"fa/{key}"]]: np.asarray(row["fa/image"]) for row in found.records("fa")}
    assert images.keys() == set(NAMES)
    for name, (_, fa) in expected().items():
        assert np.array_equal(images[name][..., 0], fa)
