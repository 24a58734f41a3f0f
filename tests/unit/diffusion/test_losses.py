"""Every loss against a second computation in numpy and scipy, float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import ndimage

from cffa_core.diffusion.losses import (
    ModalityLatents,
    NoiseSchedule,
    blur,
    eps_weight,
    erode,
    high_pass,
    latent_mask,
    masked_mean,
    ngf_distance,
    pair_loss,
    sobel_distance,
    x0_weight,
)
from cffa_core.errors import ModelUnavailable
from cffa_core.jobs.spec import LossSpec

SD15_SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = NoiseSchedule.from_config(SD15_SCHEDULER)


def latents(seed: int, rows: int = 2, size: int = 12) -> torch.Tensor:
    return torch.randn(rows, 4, size, size, generator=torch.Generator().manual_seed(seed))


def holed_mask(seed: int, rows: int = 2, size: int = 12) -> torch.Tensor:
    return torch.rand(rows, 1, size, size, generator=torch.Generator().manual_seed(seed)) > 0.02


def make_branch(seed: int, timesteps: list[int], valid: torch.Tensor | None = None) -> ModalityLatents:
    x0, noise = latents(seed), latents(seed + 1)
    t = torch.tensor(timesteps)
    return ModalityLatents(
        x0=x0,
        x_t=SCHEDULE.add_noise(x0, noise, t),
        noise=noise,
        timesteps=t,
        valid=torch.ones(2, 1, 12, 12, dtype=torch.bool) if valid is None else valid,
        predicted_noise=noise + 0.3 * latents(seed + 2),
    )


def each_plane(x: np.ndarray, operation: Any) -> np.ndarray:
    return np.stack([[operation(plane) for plane in row] for row in x])


def np_high_pass(x: np.ndarray) -> np.ndarray:
    # truncate 2.0 at sigma 1.5 is a radius of 3: kernel 7. scipy's "mirror" is torch's "reflect".
    return x - each_plane(x, lambda plane: ndimage.gaussian_filter(plane, 1.5, mode="mirror", truncate=2.0))


def np_gradients(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (
        each_plane(x, lambda plane: ndimage.sobel(plane, axis=1, mode="nearest")),
        each_plane(x, lambda plane: ndimage.sobel(plane, axis=0, mode="nearest")),
    )


def np_magnitude(x: np.ndarray) -> np.ndarray:
    gx, gy = np_gradients(x)
    return np.sqrt(gx**2 + gy**2 + 1e-6)


def np_ngf(a: np.ndarray, b: np.ndarray, e: float) -> np.ndarray:
    (ax, ay), (bx, by) = np_gradients(a), np_gradients(b)
    return 1 - (ax * bx + ay * by) ** 2 / ((ax**2 + ay**2 + e**2) * (bx**2 + by**2 + e**2))


def np_erode(valid: np.ndarray) -> np.ndarray:
    return each_plane(valid, lambda p: ndimage.binary_erosion(p, np.ones((3, 3)), border_value=1)).astype(bool)


def np_masked_mean(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    kept = np.broadcast_to(valid, values.shape)
    return np.array([row[mask].mean() if mask.any() else 0.0 for row, mask in zip(values, kept, strict=True)])


def np_pair_loss(cf: ModalityLatents, fa: ModalityLatents, spec: LossSpec) -> float:
    """METHODS 2 written out once more, on numpy arrays and with diffusers' alpha_bar."""
    alpha_bar = DDPMScheduler(**SD15_SCHEDULER).alphas_cumprod.double().numpy()
    total, x0_hat, x0_w = 0.0, {}, {}
    for m, b in (("cf", cf), ("fa", fa)):
        x0, x_t, noise, said = (v.double().numpy() for v in (b.x0, b.x_t, b.noise, b.predicted_noise))
        ab = alpha_bar[b.timesteps.numpy()]
        snr = ab / (1 - ab)
        per_row = ab[:, None, None, None]
        x0_hat[m] = (x_t - np.sqrt(1 - per_row) * said) / np.sqrt(per_row)
        x0_w[m] = np.minimum(1, snr) if spec.x0_weighting == "min_snr" else np.ones(2)
        eps_w = np.minimum(snr, spec.min_snr_gamma) / snr if spec.eps_weighting == "min_snr_gamma" else np.ones(2)
        valid = b.valid.numpy()
        total += (np_masked_mean((said - noise) ** 2, valid) * eps_w).mean()
        hf = np.abs(np_high_pass(x0_hat[m]) - np_high_pass(x0))
        total += spec.hf_lambda * (np_masked_mean(hf, valid) * x0_w[m]).mean()
    a, b = (np.clip(x0_hat[m], -10, 10) for m in ("cf", "fa"))
    cells = np_ngf(a, b, 1.0) if spec.struct_loss == "ngf" else np.abs(np_magnitude(a) - np_magnitude(b))
    both = np_erode(cf.valid.numpy() & fa.valid.numpy())
    return float(total + spec.struct_lambda * (np_masked_mean(cells, both) * np.minimum(x0_w["cf"], x0_w["fa"])).mean())


@pytest.mark.parametrize("x0_weighting", ["none", "min_snr"])
@pytest.mark.parametrize("struct_loss", ["sobel", "ngf"])
@pytest.mark.parametrize("eps_weighting", ["none", "min_snr_gamma"])
def test_the_whole_loss(x0_weighting: Any, struct_loss: Any, eps_weighting: Any) -> None:
    spec = LossSpec(x0_weighting=x0_weighting, struct_loss=struct_loss, eps_weighting=eps_weighting)
    cf = make_branch(10, [30, 700], holed_mask(1))
    fa = make_branch(20, [450, 999], holed_mask(2))
    total, terms = pair_loss({"cf": cf, "fa": fa}, SCHEDULE, spec)
    assert total.item() == pytest.approx(np_pair_loss(cf, fa, spec), rel=2e-4)
    assert set(terms) == {"eps_cf", "eps_fa", "hf_cf", "hf_fa", "struct"}


@pytest.mark.parametrize("x0_weighting", ["none", "min_snr"])
def test_the_perceptual_term(x0_weighting: Any) -> None:
    """Any distance of rows is weighted as the other terms on pred_x0, per modality, and added with its lambda."""
    branches = {"cf": make_branch(10, [30, 700], holed_mask(1)), "fa": make_branch(20, [450, 999], holed_mask(2))}

    def distance(pred_x0: torch.Tensor, x0: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return masked_mean((pred_x0 - x0).abs(), valid)

    spec = LossSpec(x0_weighting=x0_weighting, lpips_lambda=0.7)
    total, terms = pair_loss(branches, SCHEDULE, spec, distance)
    alpha_bar = DDPMScheduler(**SD15_SCHEDULER).alphas_cumprod.double().numpy()
    expected = np_pair_loss(branches["cf"], branches["fa"], spec)
    for m, b in branches.items():
        ab = alpha_bar[b.timesteps.numpy()]
        snr = ab / (1 - ab)
        # pred_x0 - x0 = sqrt(1 / SNR) (noise - predicted_noise)
        error = np.abs((b.noise - b.predicted_noise).double().numpy()) / np.sqrt(snr)[:, None, None, None]
        weight = np.minimum(1, snr) if x0_weighting == "min_snr" else np.ones(2)
        by_hand = (np_masked_mean(error, b.valid.numpy()) * weight).mean()
        assert terms[f"lpips_{m}"].item() == pytest.approx(by_hand, rel=2e-4)
        expected += 0.7 * by_hand
    assert total.item() == pytest.approx(expected, rel=2e-4)
    with pytest.raises(ModelUnavailable, match="weights of LPIPS"):
        pair_loss(branches, SCHEDULE, spec)


def test_default_weights_are_those_of_the_method() -> None:
    spec = LossSpec()
    total, terms = pair_loss({"cf": make_branch(1, [5, 400]), "fa": make_branch(2, [5, 400])}, SCHEDULE, spec)
    by_hand = terms["eps_cf"] + terms["eps_fa"] + 0.5 * (terms["hf_cf"] + terms["hf_fa"]) + 0.3 * terms["struct"]
    assert total.item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_without_weighting_the_last_step_is_magnified_and_with_it_bounded() -> None:
    """METHODS 2: the error of pred_x0 grows as sqrt(1 - alpha_bar) / sqrt(alpha_bar), 14.6 at t = 999."""
    assert SCHEDULE.snr(torch.tensor([999])).pow(-0.5).item() == pytest.approx(14.6, abs=0.05)
    branches = {"cf": make_branch(1, [999, 999])}
    plain = pair_loss(branches, SCHEDULE, LossSpec(x0_weighting="none"))[1]["hf_cf"]
    weighted = pair_loss(branches, SCHEDULE, LossSpec(x0_weighting="min_snr"))[1]["hf_cf"]
    assert (plain / weighted).item() == pytest.approx(14.6**2, rel=0.01)


def test_one_modality_alone_has_no_structure_term() -> None:
    branch = make_branch(1, [100, 600])
    total, terms = pair_loss({"fa": branch}, SCHEDULE, LossSpec())
    assert set(terms) == {"eps_fa", "hf_fa"}
    assert total.item() == pytest.approx((terms["eps_fa"] + 0.5 * terms["hf_fa"]).item(), rel=1e-6)


def test_the_perfect_prediction_costs_only_structure() -> None:
    cf, fa = make_branch(1, [100, 600]), make_branch(2, [100, 600])
    branches = {"cf": replace(cf, predicted_noise=cf.noise), "fa": replace(fa, predicted_noise=fa.noise)}
    _, terms = pair_loss(branches, SCHEDULE, LossSpec())
    assert terms["eps_cf"] == terms["eps_fa"] == 0
    assert terms["hf_cf"].item() == pytest.approx(0, abs=1e-5)
    assert terms["struct"] > 0.1


def test_what_is_outside_the_field_of_view_does_not_count() -> None:
    valid = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    valid[..., 9:] = False
    cf, fa = make_branch(1, [100, 600], valid), make_branch(2, [100, 600], valid)
    total, _ = pair_loss({"cf": cf, "fa": fa}, SCHEDULE, LossSpec(hf_lambda=0))
    spoiled = cf.predicted_noise.clone()
    spoiled[..., 9:] += 100
    again, _ = pair_loss({"cf": replace(cf, predicted_noise=spoiled), "fa": fa}, SCHEDULE, LossSpec(hf_lambda=0))
    assert torch.equal(total, again)


def test_an_empty_mask_gives_zero_and_a_finite_gradient() -> None:
    nothing = torch.zeros(2, 1, 12, 12, dtype=torch.bool)
    said = latents(3).requires_grad_()
    branch = replace(make_branch(1, [100, 999], nothing), predicted_noise=said)
    total, _ = pair_loss({"cf": branch, "fa": replace(branch, x0=latents(5))}, SCHEDULE, LossSpec())
    total.backward()
    assert total.item() == 0
    assert said.grad is not None and not said.grad.any()


def test_flat_latents_have_a_gradient() -> None:
    """The square root of the Sobel magnitude is kept off 0, where its derivative is infinite."""
    a = torch.zeros(1, 4, 8, 8, requires_grad=True)
    sobel_distance(a, latents(1, 1, 8)).mean().backward()
    assert a.grad is not None and a.grad.isfinite().all()


def test_blur_and_high_pass() -> None:
    x = latents(4)
    expected = np_high_pass(x.double().numpy())
    np.testing.assert_allclose(high_pass(x).numpy(), expected, atol=2e-6)
    np.testing.assert_allclose(blur(torch.ones(1, 4, 8, 8)).numpy(), 1.0, rtol=1e-6)


def test_sobel_distance() -> None:
    a, b = latents(5), latents(6)
    expected = np.abs(np_magnitude(a.double().numpy()) - np_magnitude(b.double().numpy()))
    np.testing.assert_allclose(sobel_distance(a, b).numpy(), expected, atol=1e-5)


def test_ngf_is_blind_to_polarity_and_sees_structure() -> None:
    a, b = latents(7), latents(8)
    np.testing.assert_allclose(ngf_distance(a, b).numpy(), np_ngf(a.double().numpy(), b.double().numpy(), 1), atol=1e-5)
    torch.testing.assert_close(ngf_distance(a, b), ngf_distance(a, -b))
    assert ngf_distance(a, -a).mean() < 0.25 < ngf_distance(a, b).mean()


def test_masks() -> None:
    valid = torch.ones(1, 1, 24, 24, dtype=torch.bool)
    valid[0, 0, 0, 8] = False
    small = latent_mask(valid, 8)
    assert small.tolist() == [[[[True, False, True], [True, True, True], [True, True, True]]]]
    holed = holed_mask(9)
    np.testing.assert_array_equal(erode(holed).numpy(), np_erode(holed.numpy()))
    assert erode(torch.ones(1, 1, 5, 5, dtype=torch.bool)).all()


def test_masked_mean() -> None:
    values, valid = latents(1), holed_mask(3)
    np.testing.assert_allclose(
        masked_mean(values, valid).numpy(), np_masked_mean(values.numpy(), valid.numpy()), rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["scaled_linear", "linear"])
def test_the_schedule_is_diffusers_schedule(kind: str) -> None:
    config = SD15_SCHEDULER | {"beta_schedule": kind}
    ours, theirs = NoiseSchedule.from_config(config).alpha_bar, DDPMScheduler(**config).alphas_cumprod
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ModelUnavailable, match="squaredcos_cap_v2"):
        NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


def test_predict_x0_undoes_add_noise() -> None:
    x0, noise, t = latents(1), latents(2), torch.tensor([3, 900])
    torch.testing.assert_close(
        SCHEDULE.predict_x0(SCHEDULE.add_noise(x0, noise, t), noise, t), x0, rtol=1e-3, atol=1e-4
    )


def test_weights() -> None:
    snr = torch.tensor([0.01, 1.0, 25.0])
    assert x0_weight(snr, LossSpec(x0_weighting="min_snr")).tolist() == pytest.approx([0.01, 1, 1])
    assert x0_weight(snr, LossSpec(x0_weighting="none")).tolist() == [1, 1, 1]
    assert eps_weight(snr, LossSpec(eps_weighting="min_snr_gamma")).tolist() == pytest.approx([1, 1, 0.2])
