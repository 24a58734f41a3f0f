"""Working folders of uploads: removed at the end, kept while their process lives, removed once it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cffa_core.errors import StorageUnavailable
from services.api.scratch import YOUNG_SECONDS, remove_abandoned, upload_folder

HOLDER = """
import pathlib, sys, time
from services.api.scratch import upload_folder
with upload_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "upload.zip").write_bytes(b"half")
    print(folder, flush=True)
    time.sleep(60)
"""


def age(folder: Path) -> None:
    old = time.time() - YOUNG_SECONDS - 60
    os.utime(folder, (old, old))


def test_a_folder_is_empty_and_gone_afterwards(tmp_path: Path) -> None:
    with upload_folder(tmp_path) as folder:
        (folder / "upload.zip").write_bytes(b"x")
        assert folder.parent == tmp_path / "uploads"
    assert not folder.exists()


def test_another_processes_upload_is_kept_while_it_lives(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            folder = Path(other.stdout.readline().strip())
            age(folder)
            assert remove_abandoned(tmp_path) == 0
            assert (folder / "upload.zip").read_bytes() == b"half"
        finally:
            other.send_signal(signal.SIGKILL)
    assert remove_abandoned(tmp_path) == 1
    assert not folder.exists()


def test_a_young_folder_may_be_about_to_be_locked(tmp_path: Path) -> None:
    (tmp_path / "uploads" / "young").mkdir(parents=True)
    assert remove_abandoned(tmp_path) == 0
    age(tmp_path / "uploads" / "young")
    assert remove_abandoned(tmp_path) == 1


def test_no_room_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("a file where the folder should be")
    with pytest.raises(StorageUnavailable, match="no room"), upload_folder(tmp_path):
        pass
