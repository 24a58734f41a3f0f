"""Landmark registration: a known homography comes back, wrong points do little harm, hopeless ones are refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cffa_core.data.ingest import check
from cffa_core.data.registration import BadLandmarks, fit, parse_points, project, warp
from cffa_core.evaluation.scores import compare, pair_features
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder

HOMOGRAPHY = np.array([[0.96, -0.17, 31.0], [0.15, 0.99, -12.0], [8e-5, -5e-5, 1.0]])  # FA to CF
SIZE = (300, 260)


def landmarks(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points in FA and where the homography takes them in CF."""
    fa = np.random.default_rng(seed).uniform((20, 20), (280, 240), (n, 2))
    return fa, cv2.perspectiveTransform(fa[None], HOMOGRAPHY)[0]


def corner_error(matrix: np.ndarray) -> float:
    """Largest distance between the corners mapped by ``matrix`` and by the truth."""
    corners = np.array([[[0.0, 0], [300, 0], [300, 260], [0, 260]]])
    true = cv2.perspectiveTransform(corners, HOMOGRAPHY)[0]
    return float(np.abs(cv2.perspectiveTransform(corners, np.asarray(matrix))[0] - true).max())


def test_a_known_homography_is_recovered() -> None:
    found = fit(*landmarks(12), SIZE)
    assert found.kind == "homography"
    assert found.residual_px < 1e-3
    assert (found.good, found.total) == (12, 12)
    assert corner_error(found.matrix) < 1e-2


def test_wrong_points_are_outvoted() -> None:
    fa, cf = landmarks(20)
    cf[[3, 7, 11, 15]] += [60.0, -45.0]
    found = fit(fa, cf, SIZE)
    assert (found.good, found.total) == (16, 20)
    assert corner_error(found.matrix) < 1e-2


def test_the_residual_is_the_rms_distance_of_good_points() -> None:
    fa, cf = landmarks(40)
    noisy = cf + np.random.default_rng(1).normal(0, 1, cf.shape)
    found = fit(fa, noisy, SIZE)
    assert found.residual_px == pytest.approx(np.sqrt(2), abs=0.35)  # sigma 1 in x and y, less what the fit explains
    assert np.abs(project(found.matrix, fa) - cf).max() < 2


def test_three_points_give_an_affine_map() -> None:
    fa = np.array([[10.0, 10], [200, 30], [50, 220]])
    matrix = np.array([[0.9, 0.1, 5.0], [-0.1, 1.1, -7.0]])
    found = fit(fa, fa @ matrix[:, :2].T + matrix[:, 2], SIZE)
    assert found.kind == "affine"
    np.testing.assert_allclose(found.matrix[:2], matrix, atol=1e-6)


@pytest.mark.parametrize(
    ("fa", "cf", "why"),
    [
        (np.zeros((2, 2)), np.zeros((2, 2)), "at least 3"),
        (np.zeros((5, 2)), np.zeros((4, 2)), "4 CF points but 5 FA points"),
        (np.ones((6, 2)), np.ones((6, 2)), "no homography"),
        (np.arange(12.0).reshape(6, 2), np.arange(12.0).reshape(6, 2) * 2, "no homography"),
        (*landmarks(8), "no homography"),
    ],
    ids=["too few", "unequal", "one point", "one line", "mirrored"],
)
def test_hopeless_points_are_refused(fa: np.ndarray, cf: np.ndarray, why: str) -> None:
    if len(fa) == 8:
        cf = cf * [-1, 1] + [300, 0]  # a mirrored image is another eye
    with pytest.raises(BadLandmarks, match=why):
        fit(fa, cf, SIZE)


@pytest.mark.parametrize("text", ["1 2\n3\n", "1 2\na b\n", "1 2 3\n", "nan 2\n", "1e9 2\n"])
def test_lines_that_are_no_points(text: str) -> None:
    with pytest.raises(BadLandmarks, match="line"):
        parse_points(text)


def test_points_may_be_written_in_several_ways() -> None:
    points = parse_points("# x y\n1 2\n\n3,4\n5;6 # disc\n 7.5\t8 \n")
    np.testing.assert_array_equal(points, [[1, 2], [3, 4], [5, 6], [7.5, 8]])


def test_warping_moves_pixels_and_marks_what_was_not_seen() -> None:
    fa = np.full((260, 300), 100, np.uint8)
    fa[100:103, 150:153] = 255
    image, seen = warp(fa, np.ones_like(fa, bool), fit(*landmarks(12), SIZE), (320, 280))
    assert image.shape == seen.shape == (280, 320)
    x, y = cv2.perspectiveTransform(np.array([[[151.0, 101.0]]]), HOMOGRAPHY)[0, 0]
    assert np.hypot(*(np.argwhere(image > 200).mean(axis=0) - [y, x])) < 0.6
    assert (image[~seen] == 0).all()
    assert (image[seen] >= 80).all()  # the valid area holds no interpolated border
    assert 0.5 < seen.mean() < 0.95


def test_a_folder_per_case_is_registered(tmp_path: Path) -> None:
    files = {}
    for seed in range(2):
        cf, straight = draw_pair(seed, 320)
        fa = cv2.warpPerspective(straight, HOMOGRAPHY, (300, 260), flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP)
        fa_points, cf_points = landmarks(10, seed)
        for number, image, points in (("01", cf, cf_points), ("02", fa, fa_points)):
            files[f"{seed}/{seed}_{number}.png"] = encode(image)
            files[f"{seed}/{seed}_{number}.txt"] = "".join(f"{x} {y}\n" for x, y in points).encode()
    checked = check(write_folder(tmp_path / "set", files))
    assert checked.ok
    for pair, images in checked.decoded():
        assert (pair.width, pair.height, pair.registration) == (320, 320, "homography")
        assert pair.residual_px is not None
        assert pair.residual_px < 0.01
        scores = compare(*pair_features(images))
        assert scores is not None
        assert scores["ridge_correlation"] > 0.8


def test_landmark_problems_are_named(tmp_path: Path) -> None:
    files = {}
    for name, data in pair_files(3).items():
        modality, file = name.split("/")
        stem = file.removesuffix(".png")
        files[f"{stem}/{stem}_{'01' if modality == 'cf' else '02'}.png"] = data
    files |= {"p0/p0_01.txt": b"1 2\n", "p1/p1_01.txt": b"1 2\n3 x\n", "p1/p1_02.txt": b"\xff\xfe"}
    files |= {"p2/p2_01.txt": b"1 2\n3 4\n", "p2/p2_02.txt": b"1 2\n3 4\n"}
    checked = check(write_folder(tmp_path / "set", files))
    assert {(problem.pointer, problem.code) for problem in checked.problems} == {
        ("p0/p0_01.txt", "bad_landmarks"),
        ("p1/p1_01.txt", "bad_landmarks"),
        ("p1/p1_02.txt", "bad_landmarks"),
        ("p2/p2_02.txt", "bad_landmarks"),
        ("", "too_few_pairs"),
    }


@pytest.mark.realdata
def test_real_unregistered_pairs_register_as_their_published_twins(real_data: Path) -> None:
    """Five cases with 20 landmarks each; after registration they are five pairs of `real_pairs`."""
    raw = check(real_data / "real_unregistered")
    assert raw.ok
    assert [pair.name for pair in raw.pairs] == ["024", "027", "034", "043", "073"]
    registered = check(real_data / "real_pairs")
    twins = {pair.name: images for pair, images in registered.decoded()}
    for pair, images in raw.decoded():
        assert pair.registration == "homography"
        assert pair.residual_px is not None
        assert pair.residual_px < 3.5
        ours, theirs = compare(*pair_features(images)), compare(*pair_features(twins[f"m{pair.name}"]))
        assert ours is not None
        assert theirs is not None
        assert ours["ridge_correlation"] > theirs["ridge_correlation"] - 0.1, pair.name
        assert ours["residual_shift_px"] < 6
