"""Registration without landmarks: known transforms of phantoms are found, pairs of two eyes are refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from cffa_core.data import ingest
from cffa_core.data.auto_registration import register
from cffa_core.data.phantom import make_phantom
from cffa_core.data.registration import project
from tests.raw_pairs import encode, write_folder

SIDE = 256


def displaced(fa: np.ndarray, angle: float, scale: float, shift: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """The FA as a camera that was turned would have it, and the map (3, 3) from that back to the CF's grid."""
    turn = np.vstack([cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), angle, scale), [0, 0, 1]])
    turn[:2, 2] += shift
    return cv2.warpPerspective(fa, turn, (SIDE, SIDE)), np.linalg.inv(turn)


def test_a_known_transform_is_found() -> None:
    seed, angle, scale, shift = 12, -11.0, 1.15, (-22.0, 9.0)
    phantom = make_phantom(seed, SIDE)
    fa, truth = displaced(phantom.fa, angle, scale, shift)
    valid, _ = displaced(phantom.valid_fa.astype(np.uint8), angle, scale, shift)
    outcome = register(phantom.cf, fa, phantom.valid_cf, valid > 0)
    assert outcome.matrix is not None
    rows, columns = np.nonzero(valid)
    points = np.stack([columns, rows], axis=1)[::97].astype(float)
    wrong = np.linalg.norm(project(outcome.matrix, points) - project(truth, points), axis=1)
    assert np.median(wrong) < 1.0 and np.percentile(wrong, 95) < 2.0


def test_the_check_registers_what_needs_it_and_leaves_out_what_cannot_be(tmp_path: Path) -> None:
    """One pair that is aligned, one that is not, one of two eyes; sizes differ, which the plain check refuses."""
    sound, moved, wrong = (make_phantom(seed, SIDE) for seed in (21, 22, 23))
    fa, _ = displaced(moved.fa, 3.0, 1.05, (14.0, -12.0))
    files = {
        "cf/a.png": encode(sound.cf),
        "fa/a.png": encode(sound.fa),
        "cf/b.png": encode(moved.cf),
        "fa/b.png": encode(fa[:240]),
        "cf/c.png": encode(wrong.cf),
        "fa/c.png": encode(np.ascontiguousarray(make_phantom(24, SIDE).fa[:230])),
    }
    folder = write_folder(tmp_path / "raw", files)
    assert {problem.code for problem in ingest.check(folder).problems} == {"size_mismatch"}
    checked = ingest.check(folder, auto_register=True)
    assert checked.ok
    assert [(pair.name, pair.registration) for pair in checked.pairs] == [("a", "given"), ("b", "auto")]
    assert [(item.pointer, item.code) for item in checked.warnings] == [("fa/c.png", "not_registered")]
    assert "landmarks" in checked.warnings[0].message
    assert [(shown.name, shown.after is None) for shown in checked.registered] == [("b", False), ("c", True)]
    index = ingest.write(checked, tmp_path / "out")
    assert index["pairs"][1]["registration"] == "auto"
