"""Folders go in and come out of storage byte for byte, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.errors import CorruptArtifact, NotFound
from cffa_core.jobs.records import StoredFiles
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.local import LocalStore
from cffa_core.storage.manifest import fetch_files, publish_folder, stored_from_json, stored_to_json


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects", secret=b"k", base_url="http://x")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "best" / "deep").mkdir(parents=True)
    (made / "log.txt").write_text("one\n", encoding="utf-8")
    (made / "best" / "deep" / "lora.bin").write_bytes(bytes(range(256)))
    (made / "empty").touch()
    return made


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_survives_the_round_trip(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    stored = publish_folder(store, folder, lambda name: f"jobs/j/train/a1/{name}")
    assert set(stored.files) == {"log.txt", "best/deep/lora.bin", "empty"}
    assert stored.files["log.txt"].key == "jobs/j/train/a1/log.txt"
    fetch_files(store, stored_from_json(stored_to_json(stored)), tmp_path / "copy")
    assert tree(tmp_path / "copy") == tree(folder)


def test_a_link_is_not_published(store: LocalStore, folder: Path) -> None:
    (folder / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(CorruptArtifact, match="passwd"):
        publish_folder(store, folder, lambda name: f"jobs/j/{name}")


def test_a_damaged_file_is_named(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    stored = publish_folder(store, folder, lambda name: f"jobs/j/{name}")
    wrong = stored.files["best/deep/lora.bin"]
    damaged = StoredFiles({**stored.files, "best/deep/lora.bin": ObjectInfo(wrong.key, wrong.size, "0" * 64)})
    with pytest.raises(CorruptArtifact, match=r"^best/deep/lora\.bin: "):
        fetch_files(store, damaged, tmp_path / "copy")


def test_a_missing_file_is_not_found(store: LocalStore, folder: Path, tmp_path: Path) -> None:
    stored = publish_folder(store, folder, lambda name: f"jobs/j/{name}")
    store.delete("jobs/j/log.txt")
    with pytest.raises(NotFound):
        fetch_files(store, stored, tmp_path / "copy")


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a\\..\\x", "", "a\0b"])
def test_names_cannot_leave_the_folder(store: LocalStore, tmp_path: Path, name: str) -> None:
    info = store.put_bytes("jobs/j/x", b"x")
    with pytest.raises(CorruptArtifact):
        fetch_files(store, StoredFiles({name: info}), tmp_path / "copy")


@pytest.mark.parametrize("raw", [{"a": {}}, {"a": {"key": "k", "size": "many", "sha256": "0"}}, {"a": 1}, ["a"]])
def test_an_unreadable_list_is_a_typed_error(raw: object) -> None:
    with pytest.raises(CorruptArtifact):
        stored_from_json(raw)  # type: ignore[arg-type]


def test_no_list_means_no_files() -> None:
    assert stored_from_json(None) == StoredFiles({})
