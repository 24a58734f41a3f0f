"""The rotation between the two modalities' initial noises, from the training latents (METHODS 2, Sampling).

Two images with inverted contrast start from the same z0 with the wrong sign; ``z_fa = R z_cf`` with an orthogonal R
corrects that and leaves each marginal untouched. Computed once per training run, used by the sampler.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cffa_core.diffusion.latents import Moments
from cffa_core.diffusion.losses import BLUR_KERNEL, erode, high_pass

# Below this many cells a covariance of 4 channels says nothing.
FEWEST_CELLS = 100


def noise_rotation(pairs: Iterable[dict[str, Moments]]) -> NDArray[np.float64] | None:
    """``R = U V^T`` of the SVD of ``S_fa^(-1/2) C_fa,cf S_cf^(-1/2)``, ``(C, C)`` float64; ``z_fa = R z_cf``.

    Channel-wise over all cells of all ``pairs``: HIGH-PASSED (illumination and field of view correlate positively,
    vessels negatively), inside the common valid region, then centred. None when the valid cells are too few or a
    channel does not vary.
    """
    columns: dict[str, list[NDArray[np.float64]]] = {"cf": [], "fa": []}
    for moments in pairs:
        both = _inside(moments["cf"].valid & moments["fa"].valid)
        for m in ("cf", "fa"):
            sharp = high_pass(moments[m].mean.double().unsqueeze(0))[0]
            columns[m].append(sharp[:, both].numpy())
    if not columns["cf"]:
        return None
    cf, fa = (np.concatenate(columns[m], axis=1) for m in ("cf", "fa"))
    if cf.shape[1] < FEWEST_CELLS:
        return None
    cf, fa = cf - cf.mean(1, keepdims=True), fa - fa.mean(1, keepdims=True)
    whiten_cf, whiten_fa = _inverse_root(cf @ cf.T / cf.shape[1]), _inverse_root(fa @ fa.T / fa.shape[1])
    if whiten_cf is None or whiten_fa is None:
        return None
    u, _, vt = np.linalg.svd(whiten_fa @ (fa @ cf.T / cf.shape[1]) @ whiten_cf)
    rotation: NDArray[np.float64] = u @ vt
    return rotation


def rotate(noise: torch.Tensor, rotation: NDArray[np.float64]) -> torch.Tensor:
    """Apply ``R`` to the channels of ``(C, h, w)``."""
    return torch.einsum("ij,jhw->ihw", torch.from_numpy(rotation).to(noise.dtype), noise)


def _inside(valid: torch.Tensor) -> torch.Tensor:
    """Cells ``(h, w)`` whose whole blur lies in the valid region: the rim of a field of view is no fine structure."""
    ringed = F.pad(valid.unsqueeze(0), (1, 1, 1, 1), value=False)
    return erode(ringed, BLUR_KERNEL // 2)[0, 0, 1:-1, 1:-1]


def _inverse_root(covariance: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Symmetric ``S^(-1/2)``, or None if S is singular."""
    values, vectors = np.linalg.eigh(covariance)
    if values[0] <= 1e-12 * max(values[-1], 1e-300):
        return None
    root: NDArray[np.float64] = vectors @ np.diag(values**-0.5) @ vectors.T
    return root
