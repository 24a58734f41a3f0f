"""Valid regions: apertures of any shape are found, dark tissue stays valid."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from cffa_core.data.field_of_view import field_of_view
from cffa_core.data.ingest import check
from cffa_core.data.phantom import make_phantom

SIZE = 256


def aperture(shape: str) -> np.ndarray:
    """A drawn aperture, (256, 256) bool."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 118**2
    return {
        "round": disc,
        "cut": disc & (rows > 40) & (rows < 216),
        "square": (rows > 20) & (rows < 230) & (columns > 30) & (columns < 250),
        "whole": np.ones((SIZE, SIZE), bool),
        "aside": (rows - 200) ** 2 + (columns - 60) ** 2 < 110**2,
    }[shape]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("shape", ["round", "cut", "square", "whole", "aside"])
@pytest.mark.parametrize("level", [25, 120], ids=["dark", "bright"])
def test_apertures_through_noise_and_jpeg(shape: str, level: int) -> None:
    random = np.random.default_rng(0)
    true = aperture(shape)
    texture = cv2.GaussianBlur(random.normal(0, 1, (SIZE, SIZE)), (0, 0), 3) * 20 + random.normal(0, 2, (SIZE, SIZE))
    image = np.where(true, level + texture, random.normal(2, 1.5, (SIZE, SIZE))).clip(0, 255).astype(np.uint8)
    jpeg = cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 60])[1], cv2.IMREAD_GRAYSCALE)
    assert overlap(field_of_view(jpeg), true) > 0.97


def test_camera_black_may_be_lifted() -> None:
    random = np.random.default_rng(0)
    true = aperture("round")
    image = np.where(true, 90, 14) + random.normal(0, 1.5, true.shape)
    assert overlap(field_of_view(image.clip(0, 255).astype(np.uint8)), true) > 0.97


def test_a_dark_angiogram_without_camera_black_is_valid_throughout() -> None:
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:SIZE, :SIZE]
    smooth = 15 + 14 * rows / SIZE + 8 * np.sin(columns / 40)
    image = (smooth + random.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)
    assert field_of_view(image).mean() > 0.97


def test_dark_tissue_inside_the_aperture_stays_valid() -> None:
    true = aperture("round")
    image = np.where(true, 80, 0).astype(np.uint8)
    cv2.circle(image, (128, 150), 40, 0, -1)  # black bleeding or non-perfusion
    cv2.line(image, (128, 128), (255, 128), 0, 4)  # a black shadow that runs out over the aperture's edge
    assert overlap(field_of_view(image), true) > 0.97


def test_labels_outside_the_aperture_are_not_valid() -> None:
    image = np.where(aperture("round"), 120, 0).astype(np.uint8)
    cv2.putText(image, "L", (4, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.5, 255, 1)
    assert not field_of_view(image)[:20, :20].any()


def test_large_images_are_found_at_a_smaller_size() -> None:
    image = cv2.resize(
        np.where(aperture("cut"), 120, 0).astype(np.uint8), (2048, 2048), interpolation=cv2.INTER_NEAREST
    )
    valid = field_of_view(image)
    assert valid.shape == (2048, 2048)
    assert overlap(valid, image > 0) > 0.97


def test_black_is_not_seen() -> None:
    assert not field_of_view(np.zeros((64, 64), np.uint8)).any()
    assert not field_of_view(np.zeros((64, 64, 3), np.uint8)).any()


def test_procedural_pairs_know_their_field_of_view() -> None:
    for seed in range(4):
        made = make_phantom(seed, resolution=256)
        assert overlap(field_of_view(made.cf), made.valid_cf > 0) > 0.98
        assert overlap(field_of_view(made.fa), made.valid_fa > 0) > 0.98


@pytest.mark.realdata
def test_real_fields_of_view(real_data: Path) -> None:
    """Ultra-wide-field crops fill the frame (some are nearly black); camera images have an aperture."""
    for pair, images in check(real_data / "real_pairs").decoded():
        shares = (images.valid_cf.mean(), images.valid_fa.mean())
        if pair.name.startswith("u"):
            assert min(shares) > 0.99, pair.name
        else:
            assert max(shares) < 0.85, pair.name
            assert min(shares) > 0.35, pair.name
            for valid in (images.valid_cf, images.valid_fa):
                hull = cv2.convexHull(np.argwhere(valid)[:, ::-1].astype(np.int32))
                assert valid.sum() / cv2.contourArea(hull) > 0.97, pair.name  # no holes, no bites
