"""LPIPS: its value against a second computation in numpy, its mask, and the weight files it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import save_file

from cffa_core.diffusion.perceptual import Lpips, latent_distance
from cffa_core.errors import CorruptArtifact, ModelUnavailable
from cffa_core.models.base import Base
from tests.lpips_weights import VGG16, random_lpips_tensors

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return random_lpips_tensors()


@pytest.fixture(scope="module")
def weights(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "weights.safetensors"
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def lpips(weights: Path) -> Lpips:
    return Lpips.load(weights)


def images(seed: int, size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def np_taps(image: np.ndarray, tensors: Tensors) -> list[np.ndarray]:
    """VGG16's five feature maps of one image (3, H, W), in float64, by windows and one matrix product per layer."""
    x = (image - np.array([-0.030, -0.088, -0.188])[:, None, None]) / np.array([0.458, 0.448, 0.450])[:, None, None]
    taps, place = [], 0
    for layer in (*VGG16, "M"):
        if layer == "M":
            taps.append(x)
            x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
            x = np.maximum.reduce([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
            place += 1
            continue
        windows = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1))), (3, 3), axis=(1, 2))
        x = np.einsum("chwij,ocij->ohw", windows, tensors[f"features.{place}.weight"], optimize=True)
        x = np.maximum(x + tensors[f"features.{place}.bias"][:, None, None], 0)
        place += 2
    return taps


def np_lpips(a: np.ndarray, b: np.ndarray, valid: np.ndarray, tensors: Tensors) -> float:
    """Zhang et al. 2018, eq. 1, on one pair of images, with the mean taken over cells that lie in ``valid (H, W)``."""
    total = 0.0
    for tap, (x, y) in enumerate(zip(np_taps(a, tensors), np_taps(b, tensors), strict=True)):
        x, y = (f / np.sqrt((f**2).sum(0) + 1e-8) for f in (x, y))
        cells = (tensors[f"lin{tap}.weight"].reshape(-1, 1, 1) * (x - y) ** 2).sum(0)
        side, height, width = 2**tap, *cells.shape
        inside = valid[: height * side, : width * side].reshape(height, side, width, side).all(axis=(1, 3))
        total += cells[inside].mean() if inside.any() else 0.0
    return total


def test_the_value(lpips: Lpips, tensors: Tensors) -> None:
    a, b = images(1), images(2)
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    valid[1, :, :, :5] = False
    valid[1, :, 20, 30] = False
    found = lpips.distance(a, b, valid)
    for row in range(2):
        expected = np_lpips(a[row].double().numpy(), b[row].double().numpy(), valid[row, 0].numpy(), tensors)
        assert found[row].item() == pytest.approx(expected, rel=1e-4) and expected > 0.1


def test_a_side_that_pooling_does_not_divide(lpips: Lpips, tensors: Tensors) -> None:
    a, b, valid = images(1, 27), images(2, 27), torch.ones(2, 1, 27, 27, dtype=torch.bool)
    expected = np_lpips(a[0].double().numpy(), b[0].double().numpy(), valid[0, 0].numpy(), tensors)
    assert lpips.distance(a, b, valid)[0].item() == pytest.approx(expected, rel=1e-4)


def test_equal_images_and_rows_without_a_valid_pixel_are_0(lpips: Lpips) -> None:
    valid = torch.ones(2, 1, 32, 32, dtype=torch.bool)
    assert lpips.distance(images(1), images(1), valid).tolist() == [0.0, 0.0]
    valid[0] = False
    found = lpips.distance(images(1), images(2), valid)
    assert found[0] == 0 and found[1] > 0


def test_dead_features_have_a_gradient(tensors: Tensors) -> None:
    """Where no feature fires, the length of the feature vector is 0 and its root has no slope."""
    dead = Lpips({name: torch.zeros(value.shape) for name, value in tensors.items()}, "")
    image = images(1).requires_grad_()
    dead.distance(image, images(2), torch.ones(2, 1, 32, 32, dtype=torch.bool)).sum().backward()
    assert image.grad is not None and torch.equal(image.grad, torch.zeros_like(image))


def latents(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_a_perfect_prediction_scores_0_and_another_does_not(lpips: Lpips, base: Base) -> None:
    valid = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    assert latent_distance(lpips, base.decode_open, latents(1), latents(1), valid).item() == pytest.approx(0, abs=1e-6)
    assert latent_distance(lpips, base.decode_open, latents(2), latents(1), valid).item() > 1e-3


def test_what_is_predicted_outside_the_field_of_view_does_not_matter(lpips: Lpips, base: Base) -> None:
    """Not even through the reach of decoder and VGG; inside it does, and that is where the gradient is."""
    valid = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    valid[..., :3] = False
    predicted = latents(2).requires_grad_()
    spoiled = torch.where(valid, predicted.detach(), torch.tensor(7.0))
    found = latent_distance(lpips, base.decode_open, predicted, latents(1), valid)
    assert torch.equal(found, latent_distance(lpips, base.decode_open, spoiled, latents(1), valid))
    found.sum().backward()
    assert predicted.grad is not None
    reached = predicted.grad.abs().sum(1, keepdim=True) > 0
    assert torch.equal(reached, valid)


def test_the_digest_is_that_of_the_file(lpips: Lpips, weights: Path) -> None:
    assert lpips.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"CFFA_LPIPS_WEIGHTS.*docs/methods.md"):
        Lpips.load(None)
    with pytest.raises(ModelUnavailable, match=r"no LPIPS weights at .*absent\.safetensors"):
        Lpips.load(tmp_path / "absent.safetensors")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"these are no weights")
    with pytest.raises(CorruptArtifact, match=r"weights\.safetensors"):
        Lpips.load(path)


SPOILED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "missing": (lambda t: t.pop("features.28.bias"), "features.28.bias is missing"),
    "unknown": (lambda t: t.update({"classifier.0.bias": np.zeros(2, np.float32)}), "classifier.0.bias is unknown"),
    "shape": (lambda t: t.update({"lin2.weight": np.zeros(256, np.float32)}), r"lin2.weight has shape \(256,\)"),
    "negative": (lambda t: t.update({"lin1.weight": -t["lin1.weight"]}), "lin1.weight has negative weights"),
    "nan": (lambda t: t.update({"features.0.bias": np.full(64, np.nan, np.float32)}), "features.0.bias is not finite"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_wrong_tensors_are_named(tensors: Tensors, tmp_path: Path, how: str) -> None:
    spoil, message = SPOILED[how]
    spoiled = dict(tensors)
    spoil(spoiled)
    save_file(spoiled, tmp_path / "weights.safetensors")
    with pytest.raises(ModelUnavailable, match=message):
        Lpips.load(tmp_path / "weights.safetensors")
