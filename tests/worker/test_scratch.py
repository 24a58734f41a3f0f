"""The cache of verified inputs and the workers' folders."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cffa_core.errors import CorruptArtifact
from cffa_core.jobs.records import StoredFiles
from cffa_core.storage.base import ObjectInfo
from cffa_core.storage.local import LocalStore
from services.worker.scratch import Scratch, cached, files_digest, prune_cache


@pytest.fixture
def objects(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "objects", secret=b"0" * 32, base_url="http://127.0.0.1")


@pytest.fixture
def stored(objects: LocalStore) -> StoredFiles:
    names = ("model.json", "weights/a.safetensors")
    return StoredFiles({name: objects.put_bytes(f"x/{name}", name.encode() * 9) for name in names})


def ignore(done: int, total: int) -> None:
    """Nobody listens."""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


EXPECTED = {name: name.encode() * 9 for name in ("model.json", "weights/a.safetensors")}


def test_inputs_are_fetched_once_and_reported_per_file(
    objects: LocalStore, stored: StoredFiles, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    folder = cached(objects, stored, tmp_path / "cache", "model", lambda done, total: told.append((done, total)))
    assert contents(folder) == EXPECTED
    assert told == [(1, 2), (2, 2)]
    for info in stored.files.values():
        objects.delete(info.key)
    assert cached(objects, stored, tmp_path / "cache", "model", ignore) == folder


@pytest.mark.parametrize("damage", ["changed", "missing", "extra"])
def test_a_damaged_copy_is_fetched_again(objects: LocalStore, stored: StoredFiles, tmp_path: Path, damage: str) -> None:
    folder = cached(objects, stored, tmp_path / "cache", "model", ignore)
    if damage == "changed":
        (folder / "model.json").write_bytes(b"x" * len(EXPECTED["model.json"]))
    elif damage == "missing":
        (folder / "model.json").unlink()
    else:
        (folder / "more.bin").write_bytes(b"")
    assert contents(cached(objects, stored, tmp_path / "cache", "model", ignore)) == EXPECTED


def test_bytes_that_differ_from_the_record_never_enter_the_cache(
    objects: LocalStore, stored: StoredFiles, tmp_path: Path
) -> None:
    true = stored.files["model.json"]
    wrong = StoredFiles({**stored.files, "model.json": ObjectInfo(true.key, true.size, "0" * 64)})
    with pytest.raises(CorruptArtifact, match=r"model\.json"):
        cached(objects, wrong, tmp_path / "cache", "model", ignore)
    assert list((tmp_path / "cache" / "model").iterdir()) == []


def test_equal_content_has_one_digest_wherever_it_is_kept(stored: StoredFiles) -> None:
    elsewhere = {name: ObjectInfo(f"y/{name}", info.size, info.sha256) for name, info in stored.files.items()}
    assert files_digest(StoredFiles(dict(reversed(elsewhere.items())))) == files_digest(stored)
    renamed = {name.replace("a.", "b."): info for name, info in stored.files.items()}
    assert files_digest(StoredFiles(renamed)) != files_digest(stored)


def test_only_folders_of_dead_workers_are_removed(tmp_path: Path) -> None:
    living = Scratch(tmp_path, "living")
    unit = living.unit_folder("unit_1", 1)
    hold = "import sys; from pathlib import Path; from services.worker.scratch import Scratch\n"
    hold += "Scratch(Path(sys.argv[1]), 'dying').unit_folder('unit_2', 1)"
    subprocess.run([sys.executable, "-c", hold, str(tmp_path)], check=True)
    assert (tmp_path / "workers" / "dying").is_dir()
    newcomer = Scratch(tmp_path, "newcomer")
    assert sorted(path.name for path in (tmp_path / "workers").iterdir()) == ["living", "newcomer"]
    assert unit.is_dir()
    living.close()
    newcomer.close()
    assert list((tmp_path / "workers").iterdir()) == []


def test_a_new_attempt_starts_with_an_empty_folder_and_the_last_ones_is_gone(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path, "one")
    first = scratch.unit_folder("unit_1", 1)
    (first / "half").write_text("x")
    second = scratch.unit_folder("unit_1", 2)
    assert not first.exists()
    assert list(second.iterdir()) == []
    scratch.close()


def test_inputs_nobody_asked_for_are_pruned(objects: LocalStore, stored: StoredFiles, tmp_path: Path) -> None:
    folder = cached(objects, stored, tmp_path / "cache", "model", ignore)
    prune_cache(tmp_path / "cache", 60)
    assert folder.is_dir()
    long_ago = time.time() - 3600
    os.utime(folder, (long_ago, long_ago))
    cached(objects, stored, tmp_path / "cache", "model", ignore)
    prune_cache(tmp_path / "cache", 60)
    assert folder.is_dir()
    os.utime(folder, (long_ago, long_ago))
    prune_cache(tmp_path / "cache", 60)
    assert list((tmp_path / "cache" / "model").iterdir()) == []
