"""The digest of a file is that of its bytes; a file and a folder can be flushed, what is not there cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from cffa_core.disk_files import flush, sha256_of


def test_the_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    """FIPS 180-2, B.3: a million times ``a``, more than one block of reading."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1_000_000)
    assert sha256_of(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"


def test_files_and_folders_are_flushed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    flush(tmp_path / "file")
    flush(tmp_path)
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "absent")
