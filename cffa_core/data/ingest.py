"""From a folder or zip that somebody sent to a checked data set: every problem named at once, nothing extracted.

The work is split: ``sources`` streams members, ``layouts`` finds pairs among their names, ``decoding`` decodes images in a
limited child, ``registration`` warps FA onto CF, ``field_of_view`` finds valid regions. Nothing here knows torch, HTTP
or the object store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cffa_core.errors import Problem

Registration = Literal["given", "homography", "affine"]
Layout = Literal["folders", "cases", "csv", "unknown"]


@dataclass(frozen=True)
class Limits:
    """What a source may hold. Sizes are bytes, sides pixels."""

    max_members: int = 20_000
    max_total_bytes: int = 32 * 2**30
    max_member_bytes: int = 512 * 2**20
    max_ratio: float = 200.0
    max_pixels: int = 64_000_000
    min_side: int = 32
    decode_seconds: int = 60


@dataclass(frozen=True)
class CheckedPair:
    """One pair that passed: CF and FA of the same eye on one pixel grid of ``width`` x ``height``."""

    name: str
    eye: str
    width: int
    height: int
    registration: Registration
    residual_px: float | None


@dataclass(frozen=True)
class PairImages:
    """Pixels of one pair: ``cf`` (H, W, 3) u8 RGB, ``fa`` (H, W) u8, ``valid_cf`` and ``valid_fa`` (H, W) bool."""

    cf: npt.NDArray[np.uint8]
    fa: npt.NDArray[np.uint8]
    valid_cf: npt.NDArray[np.bool_]
    valid_fa: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Checked:
    """Result of :func:`check`: the pairs that passed, and everything that was wrong or odd.

    ``digest`` is a SHA-256 over names, eyes, pixels and valid regions of all pairs. ``report()`` is JSON-ready.
    """

    source: Path
    layout: Layout
    pairs: tuple[CheckedPair, ...]
    problems: tuple[Problem, ...]
    warnings: tuple[Problem, ...]
    digest: str

    @property
    def ok(self) -> bool:
        """True if :func:`write` would take it in."""
        return not self.problems

    def images(self, pair: CheckedPair) -> PairImages:
        """Decode one pair (again)."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """JSON-ready: ok, layout, digest, counts, pairs, problems and warnings (pointer, code, message)."""
        raise NotImplementedError


def check(source: Path, limits: Limits | None = None, *, eye_pattern: str | None = None) -> Checked:
    """Check a folder or zip in any of the three layouts (METHODS 1). Raises ``NotFound`` if ``source`` is absent."""
    raise NotImplementedError


def write(checked: Checked, folder: Path) -> dict[str, Any]:
    """Write the checked data set below ``folder``; return the content of its dataset.json.

    Raises ``InvalidDataset`` with all problems; then nothing is written.
    """
    raise NotImplementedError
