"""The zip that is made while it is sent: any zip reader takes it, and it holds what the folder holds."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from cffa_core.errors import NotFound
from services.client.upload import BLOCK, Body


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, size in (("cf/a.png", BLOCK + 17), ("fa/a.png", 100), ("eyes.csv", 0)):
        path = tmp_path / "pairs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(n % 251 for n in range(size)))
    (tmp_path / "pairs" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "pairs" / "cf" / "link.png").symlink_to(tmp_path / "pairs" / "cf" / "a.png")
    return tmp_path / "pairs"


def test_a_folder_is_a_stored_zip_without_hidden_files_and_links(folder: Path) -> None:
    data = b"".join(Body(folder))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["eyes.csv", "cf/a.png", "fa/a.png"]
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        assert archive.read("cf/a.png") == (folder / "cf" / "a.png").read_bytes()


def test_reading_in_pieces_gives_the_same_bytes(folder: Path) -> None:
    body = Body(folder)
    pieces = list(iter(lambda: body.read(1000), b""))
    assert max(map(len, pieces)) <= 1000
    assert b"".join(pieces) == b"".join(Body(folder))


def test_progress_ends_at_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    b"".join(Body(folder, lambda done, total: seen.append((done, total))))
    assert seen[-1] == (BLOCK + 117, BLOCK + 117)
    assert seen == sorted(seen)


def test_a_zip_is_sent_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    path.write_bytes(b"PK-anything")
    assert b"".join(Body(path)) == b"PK-anything"


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        Body(tmp_path / "nowhere")
