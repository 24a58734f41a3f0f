"""The noise rotation against scipy's orthogonal Procrustes solution and on pairs whose answer is known."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, stats

from cffa_core.diffusion.latents import Moments
from cffa_core.diffusion.rotation import (
    BAND_EDGES,
    DECIMALS,
    band_rotations,
    noise_rotation,
    rotate,
    rotate_bands,
)

SIZE = 32
ROUNDING = 0.5 * 10**-DECIMALS + 1e-9


def moments_of(cf: torch.Tensor, fa: torch.Tensor, valid: torch.Tensor | None = None) -> dict[str, Moments]:
    seen = torch.ones(1, SIZE, SIZE, dtype=torch.bool) if valid is None else valid
    return {"cf": Moments(cf, torch.zeros_like(cf), seen), "fa": Moments(fa, torch.zeros_like(fa), seen)}


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixed_pairs(mixing: torch.Tensor, count: int = 3) -> list[dict[str, Moments]]:
    pairs = []
    for i in range(count):
        cf = torch.einsum("ij,jhw->ihw", torch.tril(torch.ones(4, 4)), noise(4, SIZE, SIZE, seed=i))
        fa = torch.einsum("ij,jhw->ihw", mixing, cf) + 0.5 * noise(4, SIZE, SIZE, seed=50 + i)
        pairs.append(moments_of(cf, fa))
    return pairs


def test_it_is_the_procrustes_rotation_of_the_whitened_latents() -> None:
    """Minimising |R W_cf cf - W_fa fa| over orthogonal R is another statement of METHODS 2's formula."""
    pairs = mixed_pairs(noise(4, 4, seed=9))
    columns = {}
    for m in ("cf", "fa"):
        planes = [p[m].mean.double().numpy() for p in pairs]
        sharp = [
            np.stack([c - ndimage.gaussian_filter(c, 1.5, mode="mirror", truncate=2.0) for c in plane])
            for plane in planes
        ]
        flat = np.concatenate([s[:, 3:-3, 3:-3].reshape(4, -1) for s in sharp], axis=1)
        flat -= flat.mean(1, keepdims=True)
        columns[m] = np.linalg.inv(linalg.sqrtm(np.cov(flat, bias=True)).real) @ flat
    transposed, _ = linalg.orthogonal_procrustes(columns["cf"].T, columns["fa"].T)
    found = noise_rotation(pairs)
    assert found is not None
    np.testing.assert_allclose(found, transposed.T, atol=ROUNDING)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=4 * ROUNDING)


def test_reversed_contrast_turns_the_sign() -> None:
    found = noise_rotation(mixed_pairs(-torch.eye(4)))
    assert found is not None
    np.testing.assert_allclose(found, -np.eye(4), atol=0.05)


def test_illumination_alone_does_not_decide_the_sign() -> None:
    """Slow brightness is shared, fine structure is reversed, as on real pairs: high-passing sees the second."""
    pairs = []
    for i in range(3):
        fine = noise(4, SIZE, SIZE, seed=i)
        slow = 20 * torch.sin(torch.linspace(0, 3, SIZE))[None, None, :].expand(4, SIZE, SIZE)
        pairs.append(moments_of(slow + fine, slow - fine + 0.3 * noise(4, SIZE, SIZE, seed=30 + i)))
    found = noise_rotation(pairs)
    assert found is not None and (np.diag(found) < -0.9).all()


def test_only_the_common_area_counts() -> None:
    pairs = mixed_pairs(-torch.eye(4))
    valid = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    valid[..., :8] = False
    masked = [moments_of(p["cf"].mean, p["fa"].mean, valid) for p in pairs]
    spoiled = []
    for p in masked:
        fa = p["fa"].mean.clone()
        fa[..., :8] = 100 * noise(4, SIZE, 8, seed=77)
        spoiled.append(moments_of(p["cf"].mean, fa, valid))
    np.testing.assert_array_equal(noise_rotation(masked), noise_rotation(spoiled))


@pytest.mark.parametrize("case", ["nothing", "no common area", "a flat channel"])
def test_it_says_none_rather_than_something_arbitrary(case: str) -> None:
    cf, fa = noise(4, SIZE, SIZE, seed=1), noise(4, SIZE, SIZE, seed=2)
    if case == "nothing":
        assert noise_rotation([]) is None
    elif case == "no common area":
        assert noise_rotation([moments_of(cf, fa, torch.zeros(1, SIZE, SIZE, dtype=torch.bool))]) is None
    else:
        cf[2] = 1.0
        assert noise_rotation([moments_of(cf, fa)]) is None


def test_rotated_noise_is_still_standard_normal() -> None:
    rotation = stats.ortho_group.rvs(4, random_state=np.random.default_rng(3))
    turned = rotate(noise(4, 64, 64, seed=5), rotation)
    assert stats.kstest(turned.flatten().numpy(), "norm").pvalue > 0.01
    covariance = np.cov(turned.reshape(4, -1).numpy())
    np.testing.assert_allclose(covariance, np.eye(4), atol=0.08)


def split(x: torch.Tensor, below: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of ``(C, h, w)`` below a frequency in cycles per side, and the rest."""
    ways = torch.fft.fftfreq(x.shape[-1], dtype=torch.float64) * x.shape[-1]
    low = (ways[:, None].square() + ways[None, :].square()).sqrt() < below
    coarse = torch.fft.ifft2(torch.fft.fft2(x.double()) * low).real
    return coarse, x.double() - coarse


def layered_pairs(count: int = 24, valid: torch.Tensor | None = None) -> list[dict[str, Moments]]:
    """Alike below 6 cycles per side, inverted above, as fundus images are; a fixed picture lies over all CFs."""
    pairs = []
    picture = 5 * torch.linspace(-1, 1, SIZE).expand(4, SIZE, SIZE)
    for i in range(count):
        coarse, fine = split(noise(4, SIZE, SIZE, seed=100 + i), 6.0)
        fa = coarse - fine + 0.2 * noise(4, SIZE, SIZE, seed=200 + i)
        pairs.append(moments_of((coarse + fine + picture).float(), fa.float(), valid))
    return pairs


def test_each_band_has_the_sign_of_its_own_structures() -> None:
    found = band_rotations(layered_pairs())
    assert found is not None and found.shape == (len(BAND_EDGES) + 1, 4, 4)
    for edge, rotation in zip((*BAND_EDGES, np.inf), found, strict=True):
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(4), atol=4 * ROUNDING)
        sign = 1 if edge <= 6 else -1
        assert (sign * np.diag(rotation) > 0.9).all(), f"band below {edge}"


def test_a_band_without_coefficients_takes_its_neighbour_s_rotation() -> None:
    """Latents of 32 cells a side have no frequency above 16 * sqrt(2) cycles: the last band is the one before."""
    found = band_rotations(layered_pairs())
    assert found is not None
    np.testing.assert_array_equal(found[-1], found[-2])


def test_bands_see_the_common_area_alone() -> None:
    valid = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    valid[..., :8] = False
    masked = layered_pairs(valid=valid)
    spoiled = []
    for p in masked:
        fa = p["fa"].mean.clone()
        fa[..., :8] = 100 * noise(4, SIZE, 8, seed=77)
        spoiled.append(moments_of(p["cf"].mean, fa, valid))
    np.testing.assert_allclose(band_rotations(masked), band_rotations(spoiled), atol=2 * ROUNDING)


@pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="names kernels of x86-64")
def test_no_kernel_of_numpy_s_blas_shows_in_the_kept_matrices() -> None:
    """Model cards, and so digests, are equal across CPUs whose BLAS rounds otherwise (docs/adr/0004)."""
    program = (
        "from tests.unit.diffusion.test_rotation import *\n"
        "pairs = mixed_pairs(noise(4, 4, seed=9))\n"
        "print(noise_rotation(pairs).tobytes().hex(), band_rotations(layered_pairs()).tobytes().hex())"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "OPENBLAS_CORETYPE": kernel, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for kernel in ("Prescott", "Haswell")
    }
    assert len(answers) == 1


def test_bands_say_none_rather_than_something_arbitrary() -> None:
    cf, fa = noise(4, SIZE, SIZE, seed=1), noise(4, SIZE, SIZE, seed=2)
    assert band_rotations([]) is None
    assert band_rotations([moments_of(cf, fa, torch.zeros(1, SIZE, SIZE, dtype=torch.bool))]) is None


@pytest.mark.parametrize("shape", [(64, 64), (64, 32), (33, 31)])
def test_banded_noise_is_white_and_turned_band_by_band(shape: tuple[int, int]) -> None:
    seeded = np.random.default_rng(3)
    rotations = np.stack([stats.ortho_group.rvs(4, random_state=seeded) for _ in range(len(BAND_EDGES) + 1)])
    plain = noise(4, *shape, seed=5)
    turned = rotate_bands(plain, rotations)
    assert turned.dtype == plain.dtype
    assert stats.kstest(turned.flatten().numpy(), "norm").pvalue > 0.01
    assert turned.square().sum().item() == pytest.approx(plain.square().sum().item(), rel=1e-5)
    back = rotate_bands(turned, rotations.transpose(0, 2, 1))
    torch.testing.assert_close(back, plain, rtol=0, atol=1e-5)
    power = torch.fft.fft2(turned).abs().square().mean(0).flatten()
    assert stats.kendalltau(power, np.arange(len(power))).pvalue > 0.001


def test_equal_bands_are_the_plain_rotation() -> None:
    rotation = stats.ortho_group.rvs(4, random_state=np.random.default_rng(4))
    plain = noise(4, 16, 16, seed=6)
    banded = rotate_bands(plain, np.stack([rotation] * (len(BAND_EDGES) + 1)))
    torch.testing.assert_close(banded, rotate(plain, rotation), rtol=0, atol=1e-5)
