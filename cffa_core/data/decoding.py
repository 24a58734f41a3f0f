"""Decode images of unknown origin through a memory- and time-limited child process.

The parent never gives a stranger's bytes to an image library: it sends them to ``decode_child`` and gets pixels or a
refusal back. A child that dies (a bomb, a crash of a decoder, no answer in time) is replaced; only its file is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from cffa_core.data.contracts import Bytes, Limits
from cffa_core.errors import CffaError

CHILD = Path(__file__).with_name("decode_child.py")
# Python, Pillow and numpy map about half a gigabyte; an image in work is held about four times as RGBA.
BASE_MEMORY = 768 * 2**20
BYTES_PER_PIXEL = 16
# A pattern that matches at all does so in milliseconds; one that does not end is refused after this time.
PATTERN_SECONDS = 2


@dataclass(frozen=True)
class Decoded:
    """Pixels (H, W) or (H, W, 3) u8, and notes about how they were stored (``palette``, ``alpha`` ...)."""

    pixels: Bytes
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """Why a file was not decoded: a stable code and a sentence."""

    code: str
    message: str


class Decoder:
    """One limited child process, started on first use and replaced when it dies; a context manager."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        self._pixels = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def decode(self, data: bytes) -> Decoded | Refused:
        """Decode a PNG, JPEG or TIFF, upright by its EXIF orientation, to 8 bits."""
        if self._pixels > self._limits.max_total_pixels:
            return Refused("too_large", f"all images have more than {self._limits.max_total_pixels} pixels together")
        limits = self._limits
        request = {"op": "decode", "max_pixels": limits.max_pixels, "min_side": limits.min_side}
        reply = self._ask(request | {"max_ratio": limits.max_ratio}, data, limits.decode_seconds)
        if reply is None:
            return Refused("undecodable", "decoding took too much memory or time, or crashed the decoder")
        head, body = reply
        if "code" in head:
            return Refused(str(head["code"]), str(head["message"]))
        pixels = np.frombuffer(body, dtype=np.uint8).reshape(head["shape"])
        self._pixels += pixels.shape[0] * pixels.shape[1]
        return Decoded(pixels, tuple(str(note) for note in head["notes"]))

    def matches(self, pattern: str, names: list[str]) -> list[str | None] | Refused:
        """What a regular expression finds in each name: its groups that matched, joined; None if nothing."""
        reply = self._ask({"op": "matches", "pattern": pattern}, json.dumps(names).encode(), PATTERN_SECONDS)
        if reply is None:
            return Refused("bad_pattern", "the pattern took too long")
        head, _ = reply
        if "code" in head:
            return Refused(str(head["code"]), str(head["message"]))
        return list(head["matches"])

    def _ask(self, request: dict[str, Any], data: bytes, seconds: int) -> tuple[dict[str, Any], bytes] | None:
        child = self._child or self._start()
        assert child.stdin is not None and child.stdout is not None
        head = {**request, "size": len(data), "seconds": seconds}
        try:
            child.stdin.write(json.dumps(head).encode() + b"\n")
            child.stdin.write(data)
            child.stdin.flush()
        except BrokenPipeError:
            self._stop()
            return None
        line = child.stdout.readline()
        if not line.endswith(b"\n"):
            self._stop()
            return None
        reply = json.loads(line)
        body = child.stdout.read(int(reply["size"]))
        if len(body) != reply["size"]:
            self._stop()
            return None
        return reply, body

    def _start(self) -> subprocess.Popen[bytes]:
        memory = BASE_MEMORY + BYTES_PER_PIXEL * self._limits.max_pixels + 2 * self._limits.max_member_bytes
        # An empty environment: what decodes strangers' files needs no secrets. Threads would only cost address space.
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
        if "LD_LIBRARY_PATH" in os.environ:
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        child = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self._child = child
        assert child.stdout is not None
        if child.stdout.readline() != b"ready\n":
            self._stop()
            raise CffaError("the image decoder does not start; is Pillow installed beside this Python?")
        return child

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        child.kill()
        child.wait()
        assert child.stdin is not None and child.stdout is not None
        child.stdout.close()
        try:
            child.stdin.close()
        except BrokenPipeError:
            return  # what was still buffered for the dead child is of no use
