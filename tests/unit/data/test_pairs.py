"""Pairs as tensors: ranges, padding, cropping, joint augmentation, and splits that never cut an eye."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cffa_core.data.ingest import check, write
from cffa_core.data.pairs import Pair, PairSet, dihedral, load_pairs
from cffa_core.errors import CorruptArtifact, InvalidDataset
from tests.raw_pairs import draw_pair, encode, pair_files, write_folder, write_zip


def pair_of(eye: str, index: int = 0) -> Pair:
    blank = torch.zeros(1, 8, 8)
    return Pair(f"{eye}-{index}", eye, blank.repeat(3, 1, 1), blank, blank > -1, blank > -1)


def test_raw_and_checked_give_the_same_tensors(tmp_path: Path) -> None:
    raw = write_zip(tmp_path / "set.zip", pair_files(2))
    write(check(raw), tmp_path / "checked")
    from_raw, from_checked = load_pairs(raw, 96), load_pairs(tmp_path / "checked", 96)
    assert from_raw.digest == from_checked.digest
    for a, b in zip(from_raw, from_checked, strict=True):
        assert (a.name, a.eye) == (b.name, b.eye)
        for x, y in ((a.cf, b.cf), (a.fa, b.fa), (a.valid_cf, b.valid_cf), (a.valid_fa, b.valid_fa)):
            assert torch.equal(x, y)


def test_values_and_shapes(tmp_path: Path) -> None:
    pair = load_pairs(write_folder(tmp_path / "set", pair_files(2)), 96)[0]
    cf, fa = draw_pair(0)
    assert pair.cf.shape == (3, 96, 96)
    assert pair.fa.shape == pair.valid_cf.shape == pair.valid_fa.shape == (1, 96, 96)
    assert (pair.cf.dtype, pair.valid_fa.dtype) == (torch.float32, torch.bool)
    np.testing.assert_allclose((pair.cf.permute(1, 2, 0).numpy() + 1) * 127.5, cf, atol=1e-3)
    np.testing.assert_allclose((pair.fa[0].numpy() + 1) * 127.5, fa, atol=1e-3)
    assert load_pairs(tmp_path / "set", 32)[0].cf.shape == (3, 32, 32)


def test_images_that_are_not_square_are_padded_with_invalid_pixels(tmp_path: Path) -> None:
    files = {}
    for index in range(2):
        cf, fa = draw_pair(index)
        files |= {f"cf/p{index}.png": encode(cf[:64]), f"fa/p{index}.png": encode(fa[:64])}
    folder = write_folder(tmp_path / "set", files)
    pair = load_pairs(folder, 96)[0]
    assert not pair.valid_cf[:, :16].any()
    assert not pair.valid_cf[:, 80:].any()
    assert pair.valid_cf[:, 16:80].all()
    assert (pair.cf[:, :16] == -1).all()
    small = load_pairs(folder, 48)[0]
    assert small.valid_fa[:, 9:39].all()
    assert not small.valid_fa[:, :8].any()


def test_crop_to_the_common_area(tmp_path: Path) -> None:
    files = {}
    for index in range(2):
        cf, fa = draw_pair(index)
        cf[:20], fa[:, 64:] = 0, 0
        files |= {f"cf/p{index}.png": encode(cf), f"fa/p{index}.png": encode(fa)}
    folder = write_folder(tmp_path / "set", files)
    whole, cropped = load_pairs(folder, 96)[0], load_pairs(folder, 96, crop_to_common=True)[0]
    assert 0.6 < (whole.valid_cf & whole.valid_fa).float().mean() / (76 * 64 / 96**2) < 1.1
    # The common area is 76 x 64: cropped, it fills the height, padding is left and right.
    assert (cropped.valid_cf & cropped.valid_fa).float().mean() > 0.78


def test_pairs_without_common_area_cannot_be_cropped(tmp_path: Path) -> None:
    files = pair_files(2)
    cf, fa = draw_pair(2)
    cf[:50], fa[46:] = 0, 0
    folder = write_folder(tmp_path / "set", {**files, "cf/apart.png": encode(cf), "fa/apart.png": encode(fa)})
    assert [warning.code for warning in check(folder).warnings] == ["no_overlap"]
    assert len(load_pairs(folder, 32)) == 3
    with pytest.raises(InvalidDataset) as raised:
        load_pairs(folder, 32, crop_to_common=True)
    assert [problem.pointer for problem in raised.value.problems] == ["apart"]


def test_a_bad_source_raises_all_problems(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset) as raised:
        load_pairs(write_folder(tmp_path / "set", {**pair_files(2), "cf/x.png": b"x", "fa/y.png": b"y"}))
    assert {problem.pointer for problem in raised.value.problems} == {"cf/x.png", "fa/y.png"}


def test_a_damaged_checked_folder_is_refused(tmp_path: Path) -> None:
    write(check(write_folder(tmp_path / "set", pair_files(2))), tmp_path / "checked")
    (tmp_path / "checked" / "fa" / "p1.png").write_bytes(b"x")
    with pytest.raises(CorruptArtifact, match=r"p1\.png"):
        load_pairs(tmp_path / "checked", 32)
    index = json.loads((tmp_path / "checked" / "dataset.json").read_text())
    index["pairs"][0]["name"] = "../p0"
    (tmp_path / "checked" / "dataset.json").write_text(json.dumps(index))
    with pytest.raises(CorruptArtifact, match="unsafe"):
        load_pairs(tmp_path / "checked", 32)


def test_eight_different_turns_move_images_and_masks_alike() -> None:
    plane = torch.arange(64.0).reshape(1, 8, 8)
    pair = Pair("p", "e", plane.repeat(3, 1, 1), plane, plane < 10, plane < 20)
    seen = set()
    for k in range(8):
        turned = dihedral(pair, k)
        assert torch.equal(turned.cf[0], turned.fa[0])
        assert torch.equal(turned.valid_cf[0], turned.fa[0] < 10)
        assert torch.equal(turned.valid_fa[0], turned.fa[0] < 20)
        corners = turned.fa[0][[0, 0, -1, -1], [0, -1, 0, -1]]
        assert set(corners.tolist()) == {0.0, 7.0, 56.0, 63.0}
        seen.add(tuple(turned.fa.flatten().tolist()))
    assert len(seen) == 8
    assert torch.equal(dihedral(pair, 0).cf, pair.cf)
    with pytest.raises(ValueError, match=r"0\.\.7"):
        dihedral(pair, 8)


class TestSplit:
    """Splits by eye."""

    pairs = PairSet([pair_of(f"e{i % 7}", i) for i in range(23)], "d")

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(("holdout", "eyes"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.3, 2), (0.5, 4), (0.99, 6)])
    def test_no_eye_is_cut(self, holdout: float, eyes: int, seed: int) -> None:
        train, held = self.pairs.split_by_eye(holdout, seed)
        assert len(held.eyes) == eyes
        assert not set(train.eyes) & set(held.eyes)
        assert sorted(p.name for p in (*train, *held)) == sorted(p.name for p in self.pairs)
        assert train.digest == held.digest == "d"

    def test_the_seed_decides(self) -> None:
        splits = [self.pairs.split_by_eye(0.3, seed)[1].eyes for seed in (0, 0, 1, 2, 3, 4, 5)]
        assert splits[0] == splits[1]
        assert len(set(splits)) > 2

    def test_the_order_of_pairs_does_not(self) -> None:
        backwards = PairSet(list(self.pairs)[::-1], "d")
        assert backwards.split_by_eye(0.3, 0)[1].eyes == self.pairs.split_by_eye(0.3, 0)[1].eyes

    def test_a_single_eye_stays_whole(self) -> None:
        train, held = PairSet([pair_of("e", i) for i in range(3)], "d").split_by_eye(0.5, 0)
        assert (len(train), len(held)) == (3, 0)

    def test_impossible_fractions(self) -> None:
        with pytest.raises(ValueError, match="holdout"):
            self.pairs.split_by_eye(1.0, 0)


@pytest.mark.realdata
def test_real_pairs_load_with_their_eyes(real_data: Path) -> None:
    pairs = load_pairs(real_data / "real_pairs", 128, eye_pattern=r"^(u\d)-|^(m03)[248]$")
    assert len(pairs) == 26
    assert len(pairs.eyes) == 11
    train, held = pairs.split_by_eye(0.1, 42)
    assert len(held.eyes) == 1
    assert len(train) + len(held) == 26
