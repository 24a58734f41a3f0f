"""Memorised pairs: copies of training pairs are found however they were turned, moved or noised; new eyes are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cffa_core.data.contracts import PairImages
from cffa_core.evaluation.memorisation import (
    COPY,
    SIDE,
    auth_pct,
    memorisation,
    nearest,
    thumbnail,
    turned,
)

Planes = np.ndarray


def each(images: PairImages, change: Callable[[Planes], Planes]) -> PairImages:
    """The same change on all four planes."""
    planes = (images.cf, images.fa, images.valid_cf, images.valid_fa)
    return PairImages(*(np.ascontiguousarray(change(plane)) for plane in planes))


def moved(plane: Planes, rows: int, columns: int) -> Planes:
    """Moved down and right; what comes in is black and not seen."""
    result = np.zeros_like(plane)
    height, width = plane.shape[:2]
    result[max(0, rows) : height + min(0, rows), max(0, columns) : width + min(0, columns)] = plane[
        max(0, -rows) : height - max(0, rows), max(0, -columns) : width - max(0, columns)
    ]
    return result


def noised(images: PairImages, seed: int, sigma: float = 4.0) -> PairImages:
    random = np.random.default_rng(seed)
    cf, fa = ((i + random.normal(0, sigma, i.shape)).clip(0, 255).astype(np.uint8) for i in (images.cf, images.fa))
    return PairImages(cf, fa, images.valid_cf, images.valid_fa)


def small(pairs: list[PairImages]) -> Planes:
    return np.stack([thumbnail(images) for images in pairs])


COPIES: dict[str, Callable[[PairImages, int], PairImages]] = {
    "as they are": lambda images, _: images,
    "noised": noised,
    "mirrored": lambda images, _: each(images, lambda plane: plane[:, ::-1]),
    "upside down": lambda images, _: each(images, lambda plane: plane[::-1]),
    "quarter turn": lambda images, _: each(images, np.rot90),
    "transposed": lambda images, _: each(images, lambda plane: np.rot90(plane[:, ::-1])),
    "shifted": lambda images, _: each(images, lambda plane: moved(plane, 6, -8)),
    "all at once": lambda images, seed: noised(
        each(images, lambda plane: moved(np.rot90(plane[:, ::-1]), -7, 5)), seed
    ),
}


@pytest.fixture(scope="module")
def sets(small_phantoms: list[PairImages]) -> tuple[Planes, Planes, Planes]:
    """Thumbnails of 26 new, 34 held-out and 40 training pairs, all different eyes."""
    found = small(small_phantoms)
    return found[:26], found[26:60], found[60:]


class TestCopies:
    """Training pairs among the generated ones."""

    @pytest.mark.parametrize("kind", sorted(COPIES))
    def test_every_copy_is_flagged_and_traced(
        self, small_phantoms: list[PairImages], sets: tuple[Planes, Planes, Planes], kind: str
    ) -> None:
        _, held_out, train = sets
        made = small([COPIES[kind](images, seed) for seed, images in enumerate(small_phantoms[60:72])])
        found = memorisation(made, [str(i) for i in range(12)], held_out, train)
        assert found.flagged == (True,) * 12
        assert [match.index for match in found.generated] == list(range(12))
        assert found.flagged_share.estimate is not None
        assert found.flagged_share.estimate.value == 1
        assert found.auth_pct.estimate is not None
        assert found.auth_pct.estimate.value == 0

    def test_new_eyes_are_mostly_not_flagged(self, sets: tuple[Planes, Planes, Planes]) -> None:
        new, held_out, train = sets
        found = memorisation(new, [str(i) for i in range(26)], held_out, train)
        assert sum(found.flagged) <= 5  # 5 % of 26 are expected
        assert found.auth_pct.estimate is not None
        assert found.auth_pct.estimate.value > 35  # by symmetry about half
        assert found.copies == 0

    def test_one_copy_among_new_ones_is_the_one_that_is_flagged(self, sets: tuple[Planes, Planes, Planes]) -> None:
        new, held_out, train = sets
        made = np.concatenate([new[:12], train[7:8]])
        found = memorisation(made, [str(i) for i in range(13)], held_out, train)
        assert found.flagged[12]
        assert found.generated[12].index == 7
        assert found.generated[12].distance == min(match.distance for match in found.generated)

    def test_half_a_copy_is_nearer_than_a_new_pair(self, sets: tuple[Planes, Planes, Planes]) -> None:
        """CF of a training pair with a new FA: both modalities count."""
        new, _, train = sets
        mixed = np.stack([np.stack([train[i][0], new[i][1]]) for i in range(10)])
        half = [match.distance for match in nearest(mixed, train)]
        whole = [match.distance for match in nearest(new[:10], train)]
        assert 0.2 < np.mean(half) < np.mean(whole) - 0.05


class TestSearch:
    """The nearest pair over turns and shifts."""

    def test_a_known_turn_and_shift_are_found(self, sets: tuple[Planes, Planes, Planes]) -> None:
        _, _, train = sets
        for turn in range(8):
            # The query, turned and then moved back by (3, -2), lies on the training pair.
            there = np.roll(train[5], (3, -2), axis=(1, 2))
            inverse = turn if turn >= 4 else -turn % 4
            match = nearest(np.ascontiguousarray(turned(there, inverse))[None], train)[0]
            assert (match.index, match.turn) == (5, turn)
            assert match.shift == (-3 / SIDE, 2 / SIDE)
            assert match.distance == pytest.approx(0, abs=1e-5)

    def test_the_distance_is_that_of_the_definition(self, sets: tuple[Planes, Planes, Planes]) -> None:
        """One minus the correlation of both planes, at the best of all turns and circular shifts up to 6 cells."""
        new, _, train = sets
        best = max(
            float((np.roll(turned(new[0], turn), (y, x), axis=(1, 2)) * train[3]).sum())
            for turn in range(8)
            for y in range(-6, 7)
            for x in range(-6, 7)
        )
        assert nearest(new[:1], train[3:4])[0].distance == pytest.approx(1 - best, abs=1e-5)

    def test_a_shift_beyond_the_reach_is_not_searched(self, sets: tuple[Planes, Planes, Planes]) -> None:
        _, _, train = sets
        far = np.roll(train[:1], (16, 16), axis=(2, 3))
        assert nearest(far, train[:1])[0].distance > 0.3

    def test_a_pair_does_not_match_itself(self, sets: tuple[Planes, Planes, Planes]) -> None:
        _, _, train = sets
        assert [match.index for match in nearest(train[:4], train)] == [0, 1, 2, 3]
        others = nearest(train[:4], train, own=[0, 1, 2, 3])
        assert all(match.index != index and match.distance > COPY for index, match in enumerate(others))

    def test_an_image_without_detail_is_like_nothing(self, small_phantoms: list[PairImages]) -> None:
        images = small_phantoms[0]
        flat = PairImages(np.full_like(images.cf, 90), np.full_like(images.fa, 90), images.valid_cf, images.valid_fa)
        found = nearest(thumbnail(flat)[None], small(small_phantoms[:3]))[0]
        assert found.distance == pytest.approx(1)

    def test_proportions_and_size_do_not_matter(self, small_phantoms: list[PairImages]) -> None:
        """A copy at twice the size, with a black strip below, is the same pair."""
        images = small_phantoms[3]
        double = each(images, lambda plane: np.repeat(np.repeat(plane, 2, axis=0), 2, axis=1))
        found = nearest(thumbnail(double)[None], small(small_phantoms[:6]))[0]
        assert found.index == 3
        assert found.distance < 0.05


class TestRefusals:
    """What too few pairs do not allow to say."""

    def test_a_baseline_needs_twenty_held_out_pairs(self, sets: tuple[Planes, Planes, Planes]) -> None:
        new, held_out, train = sets
        found = memorisation(new[:12], [str(i) for i in range(12)], held_out[:19], train)
        assert found.threshold is None
        assert found.flagged_share.estimate is None
        assert "20 are needed" in str(found.flagged_share.refused)
        assert found.flagged == (False,) * 12

    def test_held_out_pairs_from_the_training_set_do_not_count(self, sets: tuple[Planes, Planes, Planes]) -> None:
        new, held_out, train = sets
        leaked = np.concatenate([held_out, train[:10]])
        found = memorisation(new, [str(i) for i in range(26)], leaked, train)
        assert found.copies == 10
        assert found.threshold == memorisation(new, [str(i) for i in range(26)], held_out, train).threshold
        few = memorisation(new, [str(i) for i in range(26)], np.concatenate([held_out[:15], train[:10]]), train)
        assert "10 reference pairs are training pairs" in str(few.flagged_share.refused)

    def test_few_generated_pairs(self, sets: tuple[Planes, Planes, Planes]) -> None:
        new, held_out, train = sets
        found = memorisation(new[:9], [str(i) for i in range(9)], held_out, train)
        assert "10 are needed" in str(found.flagged_share.refused)
        assert found.auth_pct.estimate is None
        assert found.threshold is not None


def test_auth_pct_against_the_definition(sets: tuple[Planes, Planes, Planes]) -> None:
    """d(made, nearest training pair) against d(that one, its nearest other training pair), by brute force."""
    new, _, train = sets
    made = np.concatenate([new[:8], train[:4]])
    matches = nearest(made, train)
    between = np.array([[nearest(train[i : i + 1], train[j : j + 1])[0].distance for j in range(40)] for i in range(6)])
    for match in matches:
        if match.index < 6:
            row = np.delete(between[match.index], match.index)
            own = nearest(train[match.index : match.index + 1], train, own=[match.index])[0].distance
            assert own == pytest.approx(row.min(), abs=1e-5)
    found = auth_pct(matches, train, [str(i) for i in range(12)]).estimate
    assert found is not None
    assert found.n == 12
    near = [nearest(train[m.index : m.index + 1], train, own=[m.index])[0].distance for m in matches]
    wanted = 100 * np.mean([m.distance >= other for m, other in zip(matches, near, strict=True)])
    assert found.value == pytest.approx(wanted)
    assert found.value <= 100 * 8 / 12


def test_progress_counts_both_sets(sets: tuple[Planes, Planes, Planes]) -> None:
    new, held_out, train = sets
    told: list[tuple[int, int]] = []
    memorisation(new[:2], ["a", "b"], held_out[:3], train[:4], on_progress=lambda *news: told.append(news))
    assert told == [(done, 5) for done in range(1, 6)]


@pytest.mark.realdata
def test_copies_of_real_pairs_are_nearer_than_any_other_eye(real_crops: tuple[list[PairImages], list[str]]) -> None:
    """Left crops of the 26 real pairs."""
    pairs, eyes = real_crops[0][::2], real_crops[1][::2]
    train = small(pairs)
    others = [
        nearest(train[i : i + 1], np.stack([t for t, eye in zip(train, eyes, strict=True) if eye != eyes[i]]))[0]
        for i in range(0, 26, 3)
    ]
    nearest_stranger = min(match.distance for match in others)
    for kind in ("noised", "all at once"):
        made = small([COPIES[kind](images, seed) for seed, images in enumerate(pairs)])
        found = nearest(made, train)
        assert max(match.distance for match in found) < 0.5 * nearest_stranger
