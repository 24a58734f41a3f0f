"""The inversion by itself, with a prediction that is a formula: exact, and on the noise scale of the sampler."""

from __future__ import annotations

import pytest
import torch

from cffa_core.editing.inversion import StochasticSolver, invert, replay
from cffa_core.rng import generator

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
X0 = torch.randn(2, 4, 8, 8, generator=generator(1, "x0"))


def predict(x: torch.Tensor, t: torch.Tensor, i: int) -> torch.Tensor:
    """A prediction that depends on all it is given, and not linearly."""
    return torch.tanh(x + 0.001 * t) + 0.01 * i


def noise_at(i: int) -> torch.Tensor:
    return torch.randn(X0.shape, generator=generator(1, i))


@pytest.mark.parametrize(("steps", "skip"), [(50, 0.15), (10, 0.0), (2, 0.0), (20, 0.9)])
def test_the_noise_of_an_inversion_leads_back_to_the_image(steps: int, skip: float) -> None:
    solver = StochasticSolver(SD15, steps, skip)
    inversion = invert(predict, solver, X0, noise_at)
    assert len(inversion.z) == len(solver.timesteps) == steps - int(steps * skip)
    back = replay(predict, solver, inversion)
    assert (back - X0).abs().max() < 2e-5  # measured: 1e-6 to 5e-6
    changed = replay(lambda x, t, i: predict(x, t, i) + 0.1, solver, inversion)
    assert (changed - X0).abs().max() > 1e-3


def test_a_base_whose_file_ends_at_no_noise_is_inverted_exactly_all_the_same() -> None:
    config = SD15 | {"final_sigmas_type": "zero", "lower_order_final": True, "timestep_spacing": "linspace"}
    solver = StochasticSolver(config, 8, 0.0)
    assert (replay(predict, solver, invert(predict, solver, X0, noise_at)) - X0).abs().max() < 2e-5


def test_sigma_is_what_the_sampler_multiplies_its_noise_with() -> None:
    solver = StochasticSolver(SD15, 12, 0.15)
    one, none = torch.ones_like(X0), torch.zeros_like(X0)
    with_noise = []
    for z in (none, one):
        solver.restart()
        found = []
        for i, t in enumerate(solver.timesteps):
            found.append(solver.step(predict(X0, t, i), i, X0, z).mean())
        with_noise.append(torch.stack(found))
    sigmas = torch.tensor([solver.sigma(i) for i in range(len(solver.timesteps))])
    torch.testing.assert_close(with_noise[1] - with_noise[0], sigmas, rtol=1e-4, atol=1e-5)
    assert (sigmas > 0).all()


def test_skipped_steps_are_the_noisiest() -> None:
    whole, rest = StochasticSolver(SD15, 50, 0.0), StochasticSolver(SD15, 50, 0.15)
    assert whole.timesteps[0] == 951
    assert torch.equal(rest.timesteps, whole.timesteps[7:])
    noised = rest.noised(X0, noise_at(0), 0)
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[rest.timesteps[0]]
    expected = alpha_bar.sqrt() * X0 + (1 - alpha_bar).sqrt() * noise_at(0)
    torch.testing.assert_close(noised, expected, rtol=1e-4, atol=1e-5)
