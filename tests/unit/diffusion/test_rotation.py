"""The noise rotation against scipy's orthogonal Procrustes solution and on pairs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg, ndimage, stats

from cffa_core.diffusion.latents import Moments
from cffa_core.diffusion.rotation import noise_rotation, rotate

SIZE = 32


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
    np.testing.assert_allclose(found, transposed.T, atol=1e-8)
    np.testing.assert_allclose(found @ found.T, np.eye(4), atol=1e-12)


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
