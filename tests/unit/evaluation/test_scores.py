"""Each score against numbers worked out another way, and against pairs whose misalignment is known."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
from scipy.ndimage import shift as move
from skimage.feature import hessian_matrix, hessian_matrix_eigvals

from cffa_core.data.contracts import PairImages
from cffa_core.data.ridges import filled, interior, ridge_map, vessels
from cffa_core.evaluation.scores import (
    HIGHER_IS_BETTER,
    SCORES,
    SHIFT,
    cl_dice,
    compare,
    correlation,
    dice,
    features,
    mutual_information,
    ngf,
    pair_features,
    shift,
)


def moved(images: PairImages, rows: float, columns: float) -> PairImages:
    """The pair with its FA moved down and right by that many pixels."""
    fa = move(images.fa.astype(np.float64), (rows, columns), order=3, mode="constant").clip(0, 255)
    valid = move(images.valid_fa.astype(np.float64), (rows, columns), order=1) > 0.99
    return replace(images, fa=np.where(valid, fa, 0).round().astype(np.uint8), valid_fa=valid)


def scored(images: PairImages) -> dict[str, float]:
    found = compare(*pair_features(images))
    assert found is not None
    return found


class TestAgainstHandComputedNumbers:
    """The formulas on small arrays."""

    def test_correlation(self) -> None:
        a, b = np.random.default_rng(0).normal(size=(2, 500)).astype(np.float32)
        b += 0.5 * a
        assert correlation(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-5)
        assert correlation(a, -2 * a + 3) == pytest.approx(-1, abs=1e-5)
        assert correlation(a, np.zeros_like(a)) == 0

    def test_dice(self) -> None:
        a = np.array([1, 1, 1, 0, 0, 0], bool)
        b = np.array([0, 1, 1, 1, 1, 0], bool)
        assert dice(a, b) == pytest.approx(2 * 2 / 7)
        assert dice(a & False, b & False) == 0

    def test_cl_dice_counts_the_centre_lines_of_each_in_the_other(self) -> None:
        a, b = np.zeros((2, 21, 40), bool)
        a[9:12, 5:35] = True  # a bar whose centre line is row 10
        b[10, 5:20] = True  # half of that line
        line_a = 28  # skeletonising takes the bar's ends back by one pixel each
        precision, sensitivity = 14 / line_a, 1.0
        assert cl_dice(a, b) == pytest.approx(2 * precision * sensitivity / (precision + sensitivity), abs=0.02)
        assert cl_dice(a, a) == 1
        assert cl_dice(a, np.zeros_like(a)) == 0

    def test_mutual_information_of_equal_and_of_independent_values(self) -> None:
        eight = np.arange(0, 256, 32, dtype=np.uint8)
        a = np.repeat(eight, 8)
        assert mutual_information(a, a) == pytest.approx(np.log(8))
        assert mutual_information(a, 255 - a) == pytest.approx(np.log(8))
        assert mutual_information(a, np.tile(eight, 8)) == pytest.approx(0, abs=1e-12)
        noisy = np.where(np.arange(64) % 8 < 4, a, np.uint8(0))
        joint = {(0, 0): 8 / 64} | {(k, k): 4 / 64 for k in range(1, 8)} | {(k, 0): 4 / 64 for k in range(1, 8)}
        zero = 8 / 64 + 7 * 4 / 64
        expected = sum(p * np.log(p / (8 / 64 * (zero if n == 0 else 4 / 64))) for (_, n), p in joint.items())
        assert mutual_information(a, noisy) == pytest.approx(expected)

    def test_ngf_is_one_for_parallel_edges_of_either_sign_and_zero_for_perpendicular_ones(self) -> None:
        field = np.ones((4, 4), bool)
        up = np.stack([np.full((4, 4), 127), np.zeros((4, 4))]).astype(np.int8)
        aside = up[::-1]
        tilted = np.stack([np.full((4, 4), 90), np.full((4, 4), 90)]).astype(np.int8)
        assert ngf(up, -up, field) == pytest.approx(1)
        assert ngf(up, aside, field) == 0
        assert ngf(up, tilted, field) == pytest.approx(0.5, abs=0.01)

    def test_gradient_normals_follow_their_formula(self) -> None:
        random = np.random.default_rng(0)
        grey = cv2.GaussianBlur(random.uniform(0, 255, (128, 128)), (0, 0), 4)
        grey = ((grey - grey.min()) / np.ptp(grey) * 255).astype(np.uint8)
        made = features(grey, np.ones_like(grey, bool), dark_vessels=False)
        smooth = cv2.GaussianBlur(grey.astype(np.float64), (0, 0), 1.5 * 128 / 512)
        rows, columns = cv2.Sobel(smooth, cv2.CV_64F, 0, 1), cv2.Sobel(smooth, cv2.CV_64F, 1, 0)
        edge = np.hypot(rows, columns)[made.field].mean()
        expected = np.stack([rows, columns]) / np.sqrt(rows**2 + columns**2 + edge**2)
        np.testing.assert_allclose(made.normals / 127, expected, atol=0.01)

    def test_shift_of_two_maps(self) -> None:
        random = np.random.default_rng(0)
        a = cv2.GaussianBlur(random.normal(size=(128, 128)).astype(np.float32), (0, 0), 1.5)
        b = move(a, (3.25, -6.5), order=3, mode="grid-wrap").astype(np.float32)
        rows, columns = shift(a, b, np.ones((128, 128), bool))
        assert (rows, columns) == (pytest.approx(-3.25, abs=0.15), pytest.approx(6.5, abs=0.15))


class TestRidges:
    """The ridge maps and vessel masks."""

    def test_dark_lines_are_ridges_of_cf_and_bright_ones_of_fa(self) -> None:
        image = np.full((128, 128), 100, np.float32)
        image[60:63] = 50
        image[:, 90:93] = 150
        dark, bright = ridge_map(image, dark=True), ridge_map(image, dark=False)
        assert dark[61, 30] > 10 * dark[30, 91]
        assert bright[30, 91] > 10 * bright[61, 30]

    def test_the_map_is_the_largest_eigenvalue_over_scales(self) -> None:
        random = np.random.default_rng(0)
        image = cv2.GaussianBlur(random.uniform(0, 255, (512, 512)).astype(np.float32), (0, 0), 3)
        expected = np.zeros(image.shape)
        for sigma in (1.5, 2.5, 3.5):
            hessian = hessian_matrix(image, sigma, mode="reflect", use_gaussian_derivatives=True)
            largest = hessian_matrix_eigvals(hessian)[0]
            expected = np.maximum(expected, sigma**2 * np.maximum(largest, 0))
        inner = np.s_[30:-30, 30:-30]
        ours = ridge_map(image, dark=True)[inner]
        assert np.corrcoef(ours.ravel(), expected[inner].ravel())[0, 1] > 0.999

    def test_the_aperture_is_no_vessel(self) -> None:
        rows, columns = np.mgrid[:256, :256]
        valid = (rows - 128) ** 2 + (columns - 128) ** 2 < 110**2
        image = np.where(valid, 150, 0).astype(np.uint8)
        inside = ridge_map(filled(image, valid), dark=False)[interior(valid)]
        assert inside.max() < 1e-3
        assert interior(valid).sum() < valid.sum() * 0.93

    def test_vessels_are_the_strongest_twelve_percent(self) -> None:
        ridges = np.random.default_rng(0).uniform(0, 1, (100, 100)).astype(np.float32)
        field = np.zeros((100, 100), bool)
        field[20:80, 20:80] = True
        found = vessels(ridges, field)
        assert found.sum() / field.sum() == pytest.approx(0.12, abs=0.002)
        assert not found[~field].any()
        assert ridges[found].min() > ridges[field & ~found].max()
        assert not vessels(ridges, field & False).any()


class TestOnProceduralPairs:
    """Pairs whose vessels coincide, misaligned on purpose."""

    @pytest.mark.parametrize("by", [(0.0, 0.0), (0.5, -0.5), (1.3, 2.7), (-6.0, 4.5), (14.0, -9.0)])
    def test_a_known_shift_is_found_within_half_a_pixel(
        self, phantoms: list[PairImages], by: tuple[float, float]
    ) -> None:
        for images in phantoms[:2]:
            cf, fa = pair_features(moved(images, *by))
            rows, columns = shift(cf.ridges.astype(np.float32), fa.ridges.astype(np.float32), cf.field & fa.field)
            assert np.hypot(rows + by[0], columns + by[1]) < 0.5
            found = compare(cf, fa)
            assert found is not None
            assert found[SHIFT] == pytest.approx(np.hypot(*by), abs=0.5)

    def test_scores_fall_with_the_shift(self, phantoms: list[PairImages]) -> None:
        for images in phantoms[:2]:
            ladder = [scored(moved(images, step, -step)) for step in (0, 1, 2, 4)]
            for score in HIGHER_IS_BETTER:
                values = [rung[score] for rung in ladder]
                assert values == sorted(values, reverse=True), score
                assert values[-1] < 0.7 * values[0], score

    def test_another_eye_is_at_the_floor(self, phantoms: list[PairImages]) -> None:
        prepared = [pair_features(images) for images in phantoms]
        true = [compare(cf, fa) for cf, fa in prepared]
        other = [compare(prepared[i][0], prepared[i - 1][1]) for i in range(len(prepared))]
        for score in HIGHER_IS_BETTER:
            assert min(t[score] for t in true if t) > max(o[score] for o in other if o), score
        assert abs(np.mean([o["ridge_correlation"] for o in other if o])) < 0.1
        assert np.median([o[SHIFT] for o in other if o]) > 10

    def test_an_angiogram_blurred_to_nothing_is_at_the_floor(self, phantoms: list[PairImages]) -> None:
        images = phantoms[0]
        noise = np.random.default_rng(0).normal(0, 3, images.fa.shape)
        blank = cv2.GaussianBlur(images.fa.astype(np.float32), (0, 0), 25) + noise
        blurred = replace(images, fa=blank.clip(0, 255).astype(np.uint8))
        assert abs(scored(blurred)["ridge_correlation"]) < 0.1
        assert scored(blurred)["vessel_dice"] < 0.25

    def test_a_dimmer_angiogram_scores_nearly_the_same(self, phantoms: list[PairImages]) -> None:
        plain = scored(phantoms[1])
        dim = replace(phantoms[1], fa=(phantoms[1].fa * 0.6).astype(np.uint8))
        for score in HIGHER_IS_BETTER:
            assert scored(dim)[score] == pytest.approx(plain[score], abs=0.06), score

    def test_the_kept_arrays_are_small(self, phantoms: list[PairImages]) -> None:
        """Features of all pairs of a set are kept: at most 6 bytes per pixel and image."""
        for kept in pair_features(phantoms[0]):
            total = kept.ridges.nbytes + kept.normals.nbytes + kept.levels.nbytes + kept.field.nbytes
            assert total <= 6 * phantoms[0].fa.size

    def test_half_of_the_field_is_enough_and_almost_nothing_is_not(self, phantoms: list[PairImages]) -> None:
        images = phantoms[2]
        half, sliver = images.valid_fa.copy(), images.valid_fa.copy()
        half[:, 128:] = False
        sliver[:, 16:] = False
        assert scored(replace(images, valid_fa=half))["ridge_correlation"] > 0.5
        assert compare(*pair_features(replace(images, valid_fa=sliver))) is None

    def test_images_of_another_size_are_compared_on_one_grid(self, phantoms: list[PairImages]) -> None:
        images = phantoms[2]
        size = (384, 384)
        larger = PairImages(
            cv2.resize(images.cf, size, interpolation=cv2.INTER_CUBIC),
            cv2.resize(images.fa, size, interpolation=cv2.INTER_CUBIC),
            cv2.resize(images.valid_cf.astype(np.uint8), size) > 0,
            cv2.resize(images.valid_fa.astype(np.uint8), size) > 0,
        )
        mixed = compare(pair_features(images)[0], pair_features(larger)[1])
        assert mixed is not None
        assert set(mixed) == set(SCORES)
        assert mixed["ridge_correlation"] > 0.8 * scored(images)["ridge_correlation"]
