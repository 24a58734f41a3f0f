"""Working folders of uploads. Several API processes may share one scratch folder, on one machine or over a mount.

Each folder is locked for as long as its process lives, so that what a killed process left can be told from what
another one is working in. Knows nothing of data sets.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from cffa_core.errors import StorageUnavailable

LOCK = "lock"
YOUNG_SECONDS = 600.0
"""A folder this young may belong to a process that has not locked it yet."""
UNLOCKED_SECONDS = 86_400.0
"""Where a file system knows no locks, a folder counts as abandoned after this time."""


@contextlib.contextmanager
def upload_folder(scratch: Path) -> Iterator[Path]:
    """A new, empty folder below ``scratch``, removed when the block ends; raises :class:`StorageUnavailable`."""
    parent = scratch / "uploads"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise StorageUnavailable(f"no room for uploads: {error.strerror}") from error
    try:
        with (folder / LOCK).open("xb") as lock:
            with contextlib.suppress(OSError):  # no locks here: the folder's age must do
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(scratch: Path) -> int:
    """Remove what killed processes left of uploads; returns how many folders. Those of living ones are kept."""
    removed = 0
    for folder in (scratch / "uploads").glob("*"):
        with contextlib.suppress(FileNotFoundError):  # its process, or another one that cleans up, was faster
            if time.time() - folder.stat().st_mtime > YOUNG_SECONDS and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed


def _is_abandoned(folder: Path) -> bool:
    path = folder / LOCK
    if not path.exists():
        return True
    with path.open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - folder.stat().st_mtime > UNLOCKED_SECONDS
    return True
