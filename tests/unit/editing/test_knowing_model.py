"""With a model that knows what a lesion is, an edit adds exactly that lesion, and removes it again.

No small trained model knows lesions well, so this one is made to: it predicts the noise that belongs to a picture with
the lesion where the text names one, and to the picture without it elsewhere. Its UNet runs all the same, since the
masks come from its attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cffa_core.diffusion.losses import NoiseSchedule
from cffa_core.editing.denoiser import BaseAlone
from cffa_core.editing.editor import PairEditor
from cffa_core.jobs.edit_spec import EditSettings
from cffa_core.models.base import Base
from cffa_core.rng import generator

EYE = torch.randn(2, 4, 8, 8, generator=generator(5, "eye"))
LESION = torch.zeros(2, 4, 8, 8)
LESION[0, :, 2:4, 5:7], LESION[1, :, 2:4, 5:7] = 1.0, -2.0  # dark in one image, bright in the other, at one place


class KnowsLesions(BaseAlone):
    """Sees `EYE` without a prompt, and `EYE + LESION` with any."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.nothing = base.encode_prompts([""])[0]

    def predict_noise(
        self, x: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor, rows: Sequence[str]
    ) -> torch.Tensor:
        super().predict_noise(x, timesteps, text, rows)
        images = [("cf", "fa").index(row) for row in rows]
        seen = torch.stack(
            [
                EYE[image] if torch.equal(said, self.nothing) else EYE[image] + LESION[image]
                for image, said in zip(images, text, strict=True)
            ]
        )
        alpha_bar = NoiseSchedule.from_config(self.base.scheduler_config).alpha_bar[int(timesteps)]
        return (x - alpha_bar.sqrt() * seen) / (1 - alpha_bar).sqrt()


def edited(base: Base, x0: torch.Tensor, **term: Any) -> torch.Tensor:
    given = {"edits": [{"text": "lesion", "strength": 1.0, "threshold": 0.0, **term}], "resolution": 64, "steps": 20}
    settings = EditSettings.model_validate({"count": 1, **given})
    return PairEditor(KnowsLesions(base), settings).latents(x0, seed=1)[0]


def test_adding_draws_the_lesion_in_both_images_and_removing_takes_it_away(base: Base) -> None:
    added = edited(base, EYE)
    assert (added - (EYE + LESION)).abs().max() < 0.1
    removed = edited(base, EYE + LESION, direction="remove")
    assert (removed - EYE).abs().max() < 0.1


def test_strength_scales_the_lesion(base: Base) -> None:
    half = edited(base, EYE, strength=0.5)
    assert (half - (EYE + LESION / 2)).abs().max() < 0.1


def test_an_edit_that_ends_early_is_undone_by_the_steps_that_follow(base: Base) -> None:
    whole, early = (edited(base, EYE, **more) - EYE for more in ({}, {"cooldown": 8}))
    assert early.norm() < 0.5 * whole.norm()


@pytest.mark.parametrize("modality", [0, 1], ids=["cf", "fa"])
def test_only_the_place_of_the_lesion_changes(base: Base, modality: int) -> None:
    change = (edited(base, EYE) - EYE)[modality].abs().sum(0)
    elsewhere = LESION[modality].abs().sum(0) == 0
    assert change[~elsewhere].min() > 3.0
    assert change[elsewhere].max() < 1e-3
