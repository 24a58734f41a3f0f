"""Archives: order, bytes, digests, byte ranges, and every way they can have been tampered with."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cffa_core.errors import CorruptArtifact
from cffa_core.recipes.archive import merge_archives, verify_archive, write_part_archive

HEADER = {"spec": {"count": 5, "seed": 42}, "model_digest": "ab" * 32, "numerics_key": "cpu/x"}


def content(modality: str, index: int) -> bytes:
    """Bytes that stand for one PNG; the archive does not look inside."""
    return hashlib.shake_256(f"{modality}{index}".encode()).digest(100 + 7 * index)


def make_part(folder: Path, indices: range) -> Path:
    """A part folder as generate_part leaves it."""
    pairs = []
    for index in indices:
        pair: dict[str, Any] = {"index": index, "seed": 1000 + index, "fa_chroma": 0.25 * index}
        for modality in ("cf", "fa"):
            path = folder / modality / f"{index:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            raw = content(modality, index)
            path.write_bytes(raw)
            name = f"{modality}/{index:06d}.png"
            pair[modality] = {"name": name, "size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        pairs.append(pair)
    (folder / "part.json").write_text(json.dumps({"pairs": pairs}))
    return folder


def part_zips(folder: Path, count: int, part_size: int) -> list[Path]:
    """Part archives of a grid."""
    found = []
    for start in range(0, count, part_size):
        source = make_part(folder / f"size{part_size}-{start}", range(start, min(count, start + part_size)))
        found.append(folder / f"size{part_size}-{start}.zip")
        write_part_archive(source, found[-1], HEADER)
    return found


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    target = tmp_path / "archive.zip"
    merge_archives(part_zips(tmp_path, 5, 2), target, HEADER)
    return target


def test_members_are_stored_in_index_order_with_fixed_attributes(merged: Path) -> None:
    with zipfile.ZipFile(merged) as archive:
        infos = archive.infolist()
    images = [f"{modality}/{index:06d}.png" for index in range(5) for modality in ("cf", "fa")]
    assert [info.filename for info in infos] == [*images, "manifest.json"]
    fixed = {
        (info.compress_type, info.date_time, info.create_system, info.external_attr, info.flag_bits) for info in infos
    }
    assert fixed == {(zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 3, 0o100644 << 16, 0)}


def test_manifest_lists_size_and_sha256_of_every_image_and_the_header(merged: Path) -> None:
    with zipfile.ZipFile(merged) as archive:
        manifest = json.loads(archive.read("manifest.json"))
        for index, pair in enumerate(manifest["pairs"]):
            assert pair["index"] == index
            assert pair["seed"] == 1000 + index
            assert pair["fa_chroma"] == 0.25 * index
            for modality in ("cf", "fa"):
                raw = archive.read(pair[modality]["name"])
                assert raw == content(modality, index)
                assert pair[modality]["size"] == len(raw)
                assert pair[modality]["sha256"] == hashlib.sha256(raw).hexdigest()
    assert {key: manifest[key] for key in HEADER} == HEADER
    assert set(manifest) == {"format", "pairs", "exhausted", *HEADER}


def test_same_pairs_give_the_same_bytes_whenever_and_however_they_were_split(tmp_path: Path) -> None:
    (tmp_path / "early").mkdir()
    (tmp_path / "late").mkdir()
    merge_archives(part_zips(tmp_path / "early", 5, 2), tmp_path / "early.zip", HEADER)
    late = part_zips(tmp_path / "late", 5, 3)
    for path in tmp_path.rglob("*.png"):
        os.utime(path, (2_000_000_000, 2_000_000_000))
    merge_archives(late, tmp_path / "late.zip", dict(reversed(HEADER.items())))
    assert (tmp_path / "early.zip").read_bytes() == (tmp_path / "late.zip").read_bytes()


def test_index_gives_each_image_as_a_byte_range_of_the_part_zip(tmp_path: Path) -> None:
    target = tmp_path / "part.zip"
    index = write_part_archive(make_part(tmp_path / "part", range(3, 6)), target)
    raw = target.read_bytes()
    assert index["size"] == len(raw)
    assert index["sha256"] == hashlib.sha256(raw).hexdigest()
    for pair in index["pairs"]:
        for modality in ("cf", "fa"):
            entry = pair[modality]
            assert raw[entry["offset"] : entry["offset"] + entry["size"]] == content(modality, pair["index"])


def test_merge_says_where_the_manifest_is(tmp_path: Path) -> None:
    target = tmp_path / "archive.zip"
    result = merge_archives(part_zips(tmp_path, 5, 2), target, HEADER)
    entry = result["manifest"]
    raw = target.read_bytes()[entry["offset"] : entry["offset"] + entry["size"]]
    assert result["pairs"] == 5
    assert hashlib.sha256(raw).hexdigest() == entry["sha256"]
    assert len(json.loads(raw)["pairs"]) == 5


def test_parts_are_read_one_at_a_time(tmp_path: Path) -> None:
    paths = part_zips(tmp_path, 6, 2)

    def fetched_and_removed() -> Iterator[Path]:
        for path in paths:
            yield path
            path.unlink()

    merge_archives(fetched_and_removed(), tmp_path / "archive.zip", HEADER)
    assert len(verify_archive(tmp_path / "archive.zip")["pairs"]) == 6


def test_merging_holds_no_image_in_memory(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "part", range(1))
    big = bytes(48 << 20)
    (folder / "cf" / "000000.png").write_bytes(big)
    listing = json.loads((folder / "part.json").read_text())
    listing["pairs"][0]["cf"].update(size=len(big), sha256=hashlib.sha256(big).hexdigest())
    (folder / "part.json").write_text(json.dumps(listing))
    del big
    tracemalloc.start()
    try:
        write_part_archive(folder, tmp_path / "part.zip")
        merge_archives([tmp_path / "part.zip"], tmp_path / "archive.zip", HEADER)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20


def test_verify_accepts_what_was_written(merged: Path, tmp_path: Path) -> None:
    assert [pair["index"] for pair in verify_archive(merged)["pairs"]] == [0, 1, 2, 3, 4]
    write_part_archive(make_part(tmp_path / "part", range(2, 4)), tmp_path / "part.zip", HEADER)
    assert [pair["index"] for pair in verify_archive(tmp_path / "part.zip")["pairs"]] == [2, 3]


def test_any_flipped_byte_of_an_image_is_found(merged: Path, tmp_path: Path) -> None:
    raw = bytearray(merged.read_bytes())
    position = raw.find(content("fa", 3)) + 5
    raw[position] ^= 1
    broken = tmp_path / "broken.zip"
    broken.write_bytes(raw)
    with pytest.raises(CorruptArtifact):
        verify_archive(broken)


def rebuilt(source: Path, target: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """A well-formed copy with members replaced (bytes), dropped (None) or added."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in [*old.namelist(), *(name for name in change if name not in old.namelist())]:
            raw = change.get(name, old.read(name) if name in old.namelist() else b"")
            if raw is not None:
                new.writestr(zipfile.ZipInfo(name), raw, compress_type=compression)
    return target


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("cf/000002.png", b"other pixels with a correct CRC"),
        ("fa/000004.png", None),
        ("fa/000099.png", b"not in the manifest"),
        ("readme.txt", b"hello"),
        ("manifest.json", b"{}"),
        ("manifest.json", b"\xff"),
        ("manifest.json", None),
    ],
)
def test_replaced_missing_or_extra_members_are_found(
    merged: Path, tmp_path: Path, name: str, raw: bytes | None
) -> None:
    with pytest.raises(CorruptArtifact):
        verify_archive(rebuilt(merged, tmp_path / "changed.zip", {name: raw}))


def test_compressed_members_are_refused(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="compressed"):
        verify_archive(rebuilt(merged, tmp_path / "deflated.zip", {}, zipfile.ZIP_DEFLATED))


def test_bytes_outside_the_members_are_refused(merged: Path, tmp_path: Path) -> None:
    raw = merged.read_bytes()
    (tmp_path / "before.zip").write_bytes(b"#!/bin/sh\n" + raw)
    (tmp_path / "behind.zip").write_bytes(raw[:-2] + struct.pack("<H", 6) + b"hidden")
    (tmp_path / "cut.zip").write_bytes(raw[:-30])
    directory = zipfile.ZipFile(io.BytesIO(raw)).start_dir
    between = bytearray(raw[:directory] + b"hidden" + raw[directory:])
    struct.pack_into("<L", between, len(between) - 6, directory + 6)
    (tmp_path / "between.zip").write_bytes(between)
    for name in ("before.zip", "behind.zip", "between.zip", "cut.zip"):
        with pytest.raises(CorruptArtifact):
            verify_archive(tmp_path / name)


def test_a_file_that_is_not_a_zip_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(CorruptArtifact):
        verify_archive(tmp_path / "text.zip")


def test_a_part_that_differs_from_its_listing_is_not_archived(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "part", range(2))
    (folder / "fa" / "000001.png").write_bytes(b"something else")
    with pytest.raises(CorruptArtifact, match=r"fa/000001\.png"):
        write_part_archive(folder, tmp_path / "part.zip")
    (folder / "fa" / "000001.png").unlink()
    with pytest.raises(CorruptArtifact, match=r"fa/000001\.png"):
        write_part_archive(folder, tmp_path / "part.zip")
    assert not list(tmp_path.glob("part.zip*"))


def test_a_part_flipped_in_storage_is_not_merged(tmp_path: Path) -> None:
    paths = part_zips(tmp_path, 4, 2)
    raw = bytearray(paths[1].read_bytes())
    raw[raw.find(content("cf", 2)) + 1] ^= 0x80
    paths[1].write_bytes(raw)
    with pytest.raises(CorruptArtifact):
        merge_archives(paths, tmp_path / "archive.zip", HEADER)
    assert not list(tmp_path.glob("archive.zip*"))


def test_parts_out_of_order_are_not_merged(tmp_path: Path) -> None:
    paths = part_zips(tmp_path, 4, 2)
    with pytest.raises(CorruptArtifact, match="comes after"):
        merge_archives(reversed(paths), tmp_path / "archive.zip", HEADER)


def test_a_listing_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    folder = make_part(tmp_path / "part", range(1))
    listing = json.loads((folder / "part.json").read_text())
    listing["pairs"][0]["cf"]["name"] = "../outside.png"
    (folder / "part.json").write_text(json.dumps(listing))
    with pytest.raises(CorruptArtifact):
        write_part_archive(folder, tmp_path / "part.zip")


def test_the_header_cannot_replace_format_or_pairs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs"):
        write_part_archive(make_part(tmp_path / "part", range(1)), tmp_path / "part.zip", {"pairs": []})
