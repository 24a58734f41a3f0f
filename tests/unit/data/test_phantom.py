"""Phantoms: the same seed gives the same bytes, masks tell the truth about pixels, and the pair is registered."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from skimage.registration import phase_cross_correlation

from cffa_core.data import phantom
from cffa_core.data.phantom import FINDINGS, Phantom, contact_sheet, make_phantom, write_phantoms
from cffa_core.errors import InvalidSpec
from cffa_core.jobs import spec

SEEDS = (3, 8, 21)
MASKS = {"vessel", "artery", "vein", "disc", "cup", "macula", *FINDINGS}


def contrast(image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], valid: npt.NDArray[np.bool_]) -> float:
    """Mean inside ``mask`` minus mean of a ring around it, within the eroded ``valid`` area."""
    kernel = np.ones((13, 13), np.uint8)
    inner = cv2.erode(valid.astype(np.uint8), kernel, borderValue=0) > 0
    near = (cv2.dilate(mask.astype(np.uint8), kernel) > 0) & ~(cv2.dilate(mask.astype(np.uint8), kernel[:3, :3]) > 0)
    return float(image[mask & inner].mean() - image[near & inner].mean())


@pytest.fixture(scope="module", params=SEEDS)
def eye(request: pytest.FixtureRequest) -> Phantom:
    return make_phantom(request.param, 512, findings=frozenset(FINDINGS), phase="mid")


@pytest.fixture(scope="module", params=SEEDS)
def healthy(request: pytest.FixtureRequest) -> Phantom:
    return make_phantom(request.param, 512, findings=frozenset(), phase="mid")


def test_same_seed_gives_the_same_bytes() -> None:
    first, second = make_phantom(5, 256), make_phantom(5, 256)
    assert first.cf.tobytes() == second.cf.tobytes()
    assert first.fa.tobytes() == second.fa.tobytes()
    assert all(np.array_equal(first.masks[key], second.masks[key]) for key in MASKS)
    assert first.fa_caption == second.fa_caption


def test_seeds_differ() -> None:
    assert make_phantom(1, 128).cf.tobytes() != make_phantom(2, 128).cf.tobytes()


def test_arrays_have_the_documented_shapes(eye: Phantom) -> None:
    assert eye.cf.shape == (512, 512, 3) and eye.cf.dtype == np.uint8
    assert eye.fa.shape == (512, 512) and eye.fa.dtype == np.uint8
    assert set(eye.masks) == MASKS
    assert all(mask.shape == (512, 512) and mask.dtype == np.bool_ for mask in eye.masks.values())


def test_black_outside_the_aperture(eye: Phantom) -> None:
    assert not eye.cf[~eye.valid_cf].any()
    assert not eye.fa[~eye.valid_fa].any()
    assert 0.5 < eye.valid_cf.mean() <= 1.0
    assert not (eye.masks["vessel"] & ~eye.valid_cf & ~eye.valid_fa).any()


def test_vessels_are_dark_in_cf_and_bright_in_fa(healthy: Phantom) -> None:
    vessels = healthy.masks["vessel"] & ~healthy.masks["disc"]
    assert contrast(healthy.cf[..., 1], vessels, healthy.valid_cf) < -8
    assert contrast(healthy.fa, vessels, healthy.valid_fa) > 20


def test_early_phase_fills_arteries_before_veins() -> None:
    for seed in SEEDS:
        pair = make_phantom(seed, 512, findings=frozenset(), phase="early")
        artery, vein = pair.masks["artery"] & ~pair.masks["vein"], pair.masks["vein"] & ~pair.masks["artery"]
        assert pair.fa[artery & pair.valid_fa].mean() > pair.fa[vein & pair.valid_fa].mean() + 15


def test_disc_is_bright_and_macula_dark(healthy: Phantom) -> None:
    disc = healthy.masks["disc"] & ~healthy.masks["vessel"]
    assert contrast(healthy.cf[..., 1], disc, healthy.valid_cf) > 10
    y, x = np.indices(healthy.fa.shape)
    centre = np.argwhere(healthy.masks["macula"]).mean(axis=0)
    radius = np.sqrt(healthy.masks["macula"].sum() / np.pi)
    distance = np.hypot(y - centre[0], x - centre[1]) / radius
    plain = healthy.valid_cf & healthy.valid_fa & ~healthy.masks["vessel"] & ~healthy.masks["disc"]
    for image in (healthy.cf[..., 1], healthy.fa):
        ring = plain & (distance > 1.0) & (distance < 1.3)
        assert image[plain & (distance < 0.4)].mean() < 0.93 * image[ring].mean()


def test_haemorrhages_block_in_both(eye: Phantom) -> None:
    assert contrast(eye.cf[..., 1], eye.masks["haemorrhage"], eye.valid_cf) < -15
    assert contrast(eye.fa, eye.masks["haemorrhage"], eye.valid_fa) < -15


def test_exudates_are_bright_in_cf(eye: Phantom) -> None:
    assert contrast(eye.cf[..., 1], eye.masks["exudate"] & ~eye.masks["haemorrhage"], eye.valid_cf) > 25


def test_microaneurysms_are_dark_dots_in_cf_and_bright_in_fa(eye: Phantom) -> None:
    dots = eye.masks["microaneurysm"] & ~eye.masks["haemorrhage"] & ~eye.masks["vessel"]
    assert contrast(eye.cf[..., 1], dots, eye.valid_cf) < 0
    assert contrast(eye.fa, dots, eye.valid_fa) > 15


def test_leakage_is_bright_in_the_late_phase() -> None:
    for seed in SEEDS:
        leaking = make_phantom(seed, 512, findings=frozenset({"leakage"}), phase="late")
        dry = make_phantom(seed, 512, findings=frozenset(), phase="late")
        place = leaking.masks["leakage"] & leaking.valid_fa
        assert leaking.fa[place].mean() > dry.fa[place].mean() + 25
        assert np.array_equal(leaking.masks["vessel"], dry.masks["vessel"])


def test_pair_is_registered(healthy: Phantom) -> None:
    both = cv2.erode((healthy.valid_cf & healthy.valid_fa).astype(np.uint8), np.ones((25, 25), np.uint8), borderValue=0)
    cf = healthy.cf[..., 1].astype(np.float32)
    fa = healthy.fa.astype(np.float32)
    dark = (cv2.GaussianBlur(cf, (0, 0), 6) - cv2.GaussianBlur(cf, (0, 0), 1.2)).clip(0, 12) * both
    bright = (cv2.GaussianBlur(fa, (0, 0), 1.2) - cv2.GaussianBlur(fa, (0, 0), 6)).clip(0, 25) * both
    shift, _, _ = phase_cross_correlation(dark, bright, upsample_factor=20, normalization=None)
    assert np.abs(shift).max() < 0.5


def test_findings_and_phase_can_be_asked_for() -> None:
    pair = make_phantom(4, 256, findings=frozenset({"exudate", "haemorrhage"}), phase="late")
    assert pair.findings == ("haemorrhage", "exudate")
    assert pair.cf_caption.endswith("retinal structure, with haemorrhages, exudates")
    assert pair.fa_caption.endswith("bright retinal vessels, with haemorrhages, late phase")
    assert pair.masks["exudate"].any() and not pair.masks["leakage"].any()


def test_captions_begin_as_the_default_prompts_do() -> None:
    """The shipped base learned from captions of phantoms, and is asked with the prompts of the contract."""
    assert (phantom.CF_PROMPT, phantom.FA_PROMPT) == (spec.CF_PROMPT, spec.FA_PROMPT)


def test_fovea_lies_temporal_of_the_disc() -> None:
    for seed in range(6):
        pair = make_phantom(seed, 128)
        disc, macula = (np.argwhere(pair.masks[name])[:, 1].mean() for name in ("disc", "macula"))
        assert (macula < disc) == (pair.eye == "OD")


@pytest.mark.parametrize(
    "wrong", [{"findings": frozenset({"cataract"})}, {"phase": "noon"}, {"resolution": 32}], ids=lambda w: next(iter(w))
)
def test_wrong_requests_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InvalidSpec):
        make_phantom(1, **wrong)  # type: ignore[arg-type]


def test_folder_layout_and_repeatability(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_phantoms(tmp_path / "a", 2, seed=9, resolution=96, on_progress=lambda done, n: seen.append((done, n)))
    write_phantoms(tmp_path / "b", 2, seed=9, resolution=96)
    names = sorted(path.name for path in (tmp_path / "a" / "cf").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "a" / "fa").iterdir()) and len(names) == 2
    assert {path.name for path in (tmp_path / "a" / "masks").iterdir()} == MASKS
    for path in (tmp_path / "a").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()
    lines = [json.loads(line) for line in (tmp_path / "a" / "captions.jsonl").read_text().splitlines()]
    with (tmp_path / "a" / "eyes.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [line["name"] for line in lines] == [row["name"] for row in rows]
    assert seen == [(1, 2), (2, 2)]


def test_parallel_writing_gives_the_same_files(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "one", 8, seed=2, resolution=64, processes=1)
    write_phantoms(tmp_path / "two", 8, seed=2, resolution=64, processes=2)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


def test_contact_sheet_holds_every_eye() -> None:
    pairs = [make_phantom(seed, 64) for seed in range(3)]
    sheet = contact_sheet(pairs, columns=2, tile=64)
    assert sheet.size == (2 * 3 * 64, 2 * (64 + 16))
