"""A file read as a stream that says how far it was read, so that a long upload reports progress and can be left."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Tracked(io.FileIO):
    """Read-only stream over ``path``; ``on_bytes(done, total)`` is called after each read and may raise."""

    def __init__(self, path: Path, on_bytes: Callable[[int, int], None]) -> None:
        super().__init__(path, "rb")
        self._total = path.stat().st_size
        self._on_bytes = on_bytes

    def read(self, size: int | None = -1, /) -> bytes | Any:
        block = super().read(-1 if size is None else size)
        self._on_bytes(self.tell(), self._total)
        return block
