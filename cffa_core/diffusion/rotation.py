"""The rotation between the two modalities' initial noises, from the training latents (METHODS 2, Sampling).

Two images with inverted contrast start from the same z0 with the wrong sign; ``z_fa = R z_cf`` with an orthogonal R
corrects that and leaves each marginal untouched. One R fits one scale only: aperture, disc and macula are alike in both
modalities, vessels are inverted. So there is also an R per band of spatial frequency (docs/adr/0009). Computed once
per training run, used by the sampler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from cffa_core.diffusion.latents import Moments
from cffa_core.diffusion.losses import BLUR_KERNEL, blur, erode, high_pass

# Below this many cells a covariance of 4 channels says nothing.
FEWEST_CELLS = 100
# Borders of the bands of spatial frequency, in cycles per side of the image: octaves from layout to capillaries.
BAND_EDGES = (1.5, 3.0, 6.0, 12.0, 24.0)
# Decimals of R that are kept. Kernels of numpy's BLAS differ in the twelfth, the noise is float32: with more, the same
# training would give another model card on another CPU (docs/adr/0004).
DECIMALS = 6


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
    if not cf.shape[1]:
        return None
    return _procrustes(cf - cf.mean(1, keepdims=True), fa - fa.mean(1, keepdims=True))


def band_rotations(pairs: Sequence[dict[str, Moments]]) -> NDArray[np.float64] | None:
    """As :func:`noise_rotation`, an ``R`` for each band of :data:`BAND_EDGES`, ``(bands, C, C)`` float64.

    From the Fourier coefficients of the latents inside the common valid region (softly cut out), without the mean
    picture of all pairs: it is not what differs between pairs. A band with too few coefficients takes the ``R`` of the
    nearest one that has enough. None where no band has.
    """
    if not pairs:
        return None
    tapers = torch.stack([_taper(moments["cf"].valid & moments["fa"].valid) for moments in pairs])
    spectra = {}
    for m in ("cf", "fa"):
        latents = torch.stack([moments[m].mean.double() for moments in pairs])
        weight = tapers.unsqueeze(1)
        picture = (latents * weight).sum(0) / weight.sum(0).clamp(min=1e-9)
        apart = latents - picture
        level = (apart * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp(min=1e-9)
        spectra[m] = torch.fft.fft2((apart - level) * weight).permute(1, 0, 2, 3).numpy()
    bands = _bands(*tapers.shape[-2:]).numpy()
    found = []
    for band in range(len(BAND_EDGES) + 1):
        cf, fa = (spectra[m][:, :, bands == band].reshape(len(spectra[m]), -1) for m in ("cf", "fa"))
        found.append(_procrustes(cf, fa))
    known = [band for band, rotation in enumerate(found) if rotation is not None]
    if not known:
        return None
    nearest = [min(known, key=lambda other: (abs(other - band), other)) for band in range(len(found))]
    return np.stack([rotation for rotation in (found[band] for band in nearest) if rotation is not None])


def rotate(noise: torch.Tensor, rotation: NDArray[np.float64]) -> torch.Tensor:
    """Apply ``R`` to the channels of ``(C, h, w)``."""
    return torch.einsum("ij,jhw->ihw", torch.from_numpy(rotation).to(noise.dtype), noise)


def rotate_bands(noise: torch.Tensor, rotations: NDArray[np.float64]) -> torch.Tensor:
    """Apply to the channels of ``(C, h, w)`` the ``R`` of each frequency's band; the noise stays white.

    The Fourier transform is orthogonal up to a factor, each ``R`` is, and ``R`` is the same at a frequency and its
    mirror image, so that the result is real.
    """
    at = torch.from_numpy(rotations).to(noise.dtype)[_bands(*noise.shape[-2:])]
    spectrum = torch.fft.fft2(noise)
    turned: torch.Tensor = torch.fft.ifft2(torch.einsum("hwij,jhw->ihw", at.to(spectrum.dtype), spectrum))
    return turned.real.contiguous()


def _bands(height: int, width: int) -> torch.Tensor:
    """Band of each coefficient of ``fft2``, ``(h, w)``; the constant one belongs to the lowest."""
    rows, columns = (torch.fft.fftfreq(side, dtype=torch.float64) * side for side in (height, width))
    radius = (rows[:, None].square() + columns[None, :].square()).sqrt()
    return torch.bucketize(radius, torch.tensor(BAND_EDGES, dtype=torch.float64))


def _taper(valid: torch.Tensor) -> torch.Tensor:
    """Weight ``(h, w)`` float64 that fades to 0 at the border of the valid region and of the image."""
    inside = _inside(valid).double()[None, None]
    rows, columns = (
        torch.hann_window(side + 2, periodic=False, dtype=torch.float64)[1:-1] for side in valid.shape[-2:]
    )
    return blur(inside)[0, 0] * rows[:, None] * columns[None, :]


def _procrustes(cf: NDArray[Any], fa: NDArray[Any]) -> NDArray[np.float64] | None:
    """``U V^T`` of the whitened cross-covariance of columns ``(C, N)``, real or complex; None if it says nothing.

    Orthogonal up to the rounding to :data:`DECIMALS`, and so the same whichever BLAS numpy was built with.
    """
    count = cf.shape[1]
    if count < FEWEST_CELLS:
        return None
    whiten_cf, whiten_fa = (_inverse_root((x @ x.conj().T).real / count) for x in (cf, fa))
    if whiten_cf is None or whiten_fa is None:
        return None
    u, _, vt = np.linalg.svd(whiten_fa @ ((fa @ cf.conj().T).real / count) @ whiten_cf)
    rotation: NDArray[np.float64] = np.round(u @ vt, DECIMALS) + 0.0  # no negative zeros
    return rotation


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
