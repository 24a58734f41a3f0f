"""Features: their size, what they answer to, and that two extractors are never compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from cffa_core.data.contracts import PairImages
from cffa_core.errors import InvalidSpec, ModelUnavailable, NotEnoughData
from cffa_core.evaluation.features import Collector, FeatureSet, load_extractor, spaces
from cffa_core.evaluation.filter_bank import FilterBank


class TestFilterBank:
    """The default extractor."""

    def test_sizes_and_repeatability(self, phantoms: list[PairImages]) -> None:
        cf, fa = FilterBank().pair(phantoms[0])
        assert (cf.shape, fa.shape) == ((65,), (47,))
        again = FilterBank().pair(phantoms[0])
        np.testing.assert_array_equal(cf, again[0])
        np.testing.assert_array_equal(fa, again[1])
        assert len(FilterBank().sha256) == 64

    def test_all_kinds_weigh_about_the_same(self, reference: FeatureSet) -> None:
        for values in (reference.cf, reference.fa):
            assert np.abs(values.mean(axis=0)).max() < 8
            assert np.median(values.std(axis=0)) == pytest.approx(0.8, abs=0.6)

    @pytest.mark.parametrize("grey", [0, 128, 255])
    def test_an_image_without_content_has_features_too(self, grey: int) -> None:
        flat = np.full((80, 60), grey, np.uint8)
        for seen in (np.ones((80, 60), bool), np.zeros((80, 60), bool)):
            cf, fa = FilterBank().pair(PairImages(np.repeat(flat[..., None], 3, axis=2), flat, seen, seen))
            assert np.isfinite(cf).all()
            assert np.isfinite(fa).all()

    def test_what_was_not_seen_does_not_count(self, phantoms: list[PairImages]) -> None:
        images = phantoms[1]
        outside = ~images.valid_fa
        assert outside.mean() > 0.1
        scribbled = np.where(outside, 200, images.fa).astype(np.uint8)
        there = FilterBank().pair(replace(images, fa=scribbled))[1]
        np.testing.assert_allclose(there, FilterBank().pair(images)[1])

    def test_another_size_of_the_same_image_is_near(self, phantoms: list[PairImages]) -> None:
        """Nearer than another eye is; the finest scales differ, as they must."""
        images = phantoms[2]
        bigger = PairImages(
            cv2.resize(images.cf, (512, 512)),
            cv2.resize(images.fa, (512, 512)),
            np.kron(images.valid_cf, np.ones((2, 2), bool)),
            np.kron(images.valid_fa, np.ones((2, 2), bool)),
        )
        for side in (0, 1):
            own, other, scaled = (FilterBank().pair(i)[side] for i in (images, phantoms[3], bigger))
            assert np.linalg.norm(own - scaled) < 0.5 * np.linalg.norm(own - other)

    def test_mirroring_changes_the_places_only(self, phantoms: list[PairImages]) -> None:
        images = phantoms[0]
        mirrored = np.ascontiguousarray(images.fa[:, ::-1])
        seen = np.ascontiguousarray(images.valid_fa[:, ::-1])
        own = FilterBank().pair(images)[1]
        other = FilterBank().pair(replace(images, fa=mirrored, valid_fa=seen))[1]
        places = 18  # two grids of 3 x 3 at the end
        np.testing.assert_allclose(own[:-places], other[:-places], atol=0.6)
        assert np.abs(own[-places:] - other[-places:]).max() > 0.5


class TestSpaces:
    """CF, FA and joint."""

    def test_each_modality_has_the_same_weight_in_the_joint_space(self) -> None:
        random = np.random.default_rng(0)
        cf, fa = random.normal(5, 100, (30, 8)), random.normal(-2, 0.1, (30, 4))
        found = FeatureSet("x", "d", tuple("abcdefghij" * 3), cf, fa)
        both = spaces(found, found)
        assert [both[space][1].shape[1] for space in ("cf", "fa", "joint")] == [8, 4, 12]
        for space in both:
            assert both[space][1].mean(axis=0) == pytest.approx(0, abs=1e-9)
            assert float((both[space][1] ** 2).mean()) == pytest.approx(0.25)

    def test_two_extractors_are_never_compared(self) -> None:
        values = np.zeros((3, 2))
        one = FeatureSet("filters", "a" * 64, ("a", "b", "c"), values, values)
        with pytest.raises(InvalidSpec, match="cannot be compared"):
            spaces(one, replace(one, sha256="b" * 64))

    def test_a_reference_of_copies(self) -> None:
        values = np.ones((3, 2))
        one = FeatureSet("filters", "a", ("a", "b", "c"), values, values)
        assert np.isfinite(spaces(one, one)["joint"][0]).all()


def test_bad_extractors_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="unknown feature extractor"):
        load_extractor("inception")
    with pytest.raises(InvalidSpec, match="no weights"):
        load_extractor("filters", folder=tmp_path)
    with pytest.raises(InvalidSpec, match="local folder"):
        load_extractor("vit")
    with pytest.raises(ModelUnavailable, match="no feature extractor"):
        load_extractor("vit", folder=tmp_path / "absent")
    with pytest.raises(NotEnoughData):
        Collector(FilterBank()).result()
