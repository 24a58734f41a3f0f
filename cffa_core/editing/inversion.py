"""Edit-friendly inversion: an image as the noise of each step of a stochastic sampler (METHODS 5).

LEDITS++ (Brack et al. 2024) after Huberman-Spiegelglas et al. 2024: draw x_t of each step INDEPENDENTLY from the image,
then solve each sampler step for its noise z; run with those z the sampler gives the image back, and run with another
noise prediction it gives the image changed. The sampler is diffusers' SDE-DPM-Solver++ of order 2. Knows no UNet, text
or mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

# predict(x, t, i): noise prediction (R, C, h, w) at x (R, C, h, w), timestep t, step i.
Predict = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
OnStep = Callable[[int, int], None]

# What the way back needs to be exact, whatever a base's file says. The last step must still have noise to solve for
# ("sigma_min": with "zero" it would end at a prediction of the image instead of at the image), and no step may change
# its order at the end of a short run.
_EXACT = {
    "algorithm_type": "sde-dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "timestep_spacing": "leading",
    "final_sigmas_type": "sigma_min",
    "lower_order_final": False,
    "euler_at_final": False,
    "thresholding": False,
}


class StochasticSolver:
    """SDE-DPM-Solver++ (Lu et al. 2022) over the last of ``steps`` timesteps, with the noise of each step GIVEN.

    The part ``skip`` of the steps, the noisiest ones, is left out: the layout of an image is decided there, and an edit
    is to keep it. ``timesteps (T,)`` fall.
    """

    def __init__(self, config: Mapping[str, Any], steps: int, skip: float) -> None:
        kept = {key: value for key, value in config.items() if not key.startswith("_")}
        self._scheduler: Any = DPMSolverMultistepScheduler.from_config(kept | _EXACT)
        self._steps = steps
        self._scheduler.set_timesteps(steps)
        self.timesteps: torch.Tensor = self._scheduler.timesteps[int(steps * skip) :].clone()

    def restart(self) -> None:
        """Forget the steps before: the first step of a run is of order 1, all others look back."""
        self._scheduler.set_timesteps(self._steps)

    def noised(self, x0: torch.Tensor, noise: torch.Tensor, i: int) -> torch.Tensor:
        """``x_t = alpha_t x0 + sigma_t noise`` at step ``i``."""
        x_t: torch.Tensor = self._scheduler.add_noise(x0, noise, self.timesteps[i : i + 1])
        return x_t

    def step(self, predicted_noise: torch.Tensor, i: int, x_t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Step ``i`` with noise ``z``: ``x_{t-1} = mu + sigma z``. Steps must be taken in order after `restart`."""
        said = self._scheduler.step(predicted_noise, self.timesteps[i], x_t, variance_noise=z, return_dict=False)
        x_previous: torch.Tensor = said[0]
        return x_previous

    def sigma(self, i: int) -> float:
        """Deviation of the noise that step ``i`` adds: ``sigma_t sqrt(1 - exp(-2h))``, h the step in log-SNR / 2."""
        at = len(self._scheduler.timesteps) - len(self.timesteps) + i
        (_, sigma_s), (alpha_t, sigma_t) = (self._alpha_sigma(at), self._alpha_sigma(at + 1))
        alpha_s, _ = self._alpha_sigma(at)
        h = (alpha_t.log() - sigma_t.log()) - (alpha_s.log() - sigma_s.log())
        return float(sigma_t * torch.sqrt(1 - torch.exp(-2 * h)))

    def _alpha_sigma(self, at: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(sqrt(alpha_bar), sqrt(1 - alpha_bar))`` at place ``at`` of the schedule."""
        ratio = self._scheduler.sigmas[at].double()
        alpha = 1 / (1 + ratio**2).sqrt()
        return alpha, alpha * ratio


@dataclass(frozen=True)
class Inversion:
    """Images as noise: ``start (R, C, h, w)`` before the first step, ``z (T, R, C, h, w)`` of each step."""

    start: torch.Tensor
    z: torch.Tensor


@torch.no_grad()
def invert(
    predict: Predict,
    solver: StochasticSolver,
    x0: torch.Tensor,
    noise_at: Callable[[int], torch.Tensor],
    on_step: OnStep | None = None,
) -> Inversion:
    """The noise of each step that leads to ``x0 (R, C, h, w)``.

    ``noise_at(i) (R, C, h, w)`` is the standard normal noise of ``x_t`` at step i, drawn independently for each step.
    ``z = (x_{t-1} - mu) / sigma``; then ``x_{t-1} <- mu + sigma z``, so that rounding does not add up on the way back.
    """
    solver.restart()
    count = len(solver.timesteps)
    x = start = solver.noised(x0, noise_at(0), 0)
    found = []
    for i, t in enumerate(solver.timesteps):
        target = solver.noised(x0, noise_at(i + 1), i + 1) if i + 1 < count else x0
        mean = solver.step(predict(x, t, i), i, x, torch.zeros_like(x))
        sigma = solver.sigma(i)
        z = (target - mean) / sigma
        x = mean + sigma * z
        found.append(z)
        if on_step is not None:
            on_step(i + 1, count)
    return Inversion(start, torch.stack(found))


@torch.no_grad()
def replay(
    predict: Predict, solver: StochasticSolver, inversion: Inversion, on_step: OnStep | None = None
) -> torch.Tensor:
    """Run the sampler with the noise of an inversion; with the same ``predict`` it ends at the image it came from."""
    solver.restart()
    count = len(solver.timesteps)
    x = inversion.start
    for i, t in enumerate(solver.timesteps):
        x = solver.step(predict(x, t, i), i, x, inversion.z[i])
        if on_step is not None:
            on_step(i + 1, count)
    return x
