"""Inversion, masks and guidance against diffusers' own LEDITS++ pipeline: one image, the shipped weights, equal noise.

CF and FA are the same image here, so that joining their masks changes nothing. What differs on purpose, and is set
alike or cannot be seen here: the sampler ends at the smallest noise instead of at none (diffusers' does not reconstruct
otherwise), `skip` counts of all steps instead of on top of them, one mask for both images. And the pipeline is told how
many tokens an edit has: with the fast tokenizers of transformers 5 it takes the padding for words.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from cffa_core.data.phantom import make_phantom
from cffa_core.editing import editor as editor_module
from cffa_core.editing.denoiser import BaseAlone
from cffa_core.editing.editor import PairEditor, SourcePair
from cffa_core.editing.inversion import _EXACT
from cffa_core.jobs.edit_spec import EditSettings
from cffa_core.models.base import Base
from cffa_core.models.lora import share_weights

SIDE, STEPS = 128, 8
EDITS = [
    {"text": "late phase", "strength": 6.0, "threshold": 0.8},
    {"text": "haemorrhages", "direction": "remove", "strength": 4.0, "threshold": 0.7, "warmup": 2, "cooldown": 6},
]


@pytest.mark.parametrize("edits", [[], EDITS], ids=["no edit", "two edits"])
def test_the_same_image_with_the_same_noise_is_edited_alike(
    tiny: Base, edits: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_phantom(3, SIDE).cf
    grey = np.asarray(Image.fromarray(image).convert("L"))
    shown = np.repeat(grey[..., None], 3, axis=2)
    theirs, their_z, noise, masks = _diffusers(tiny, shown, edits)

    monkeypatch.setattr(editor_module, "pair_noise", lambda *_: lambda i: noise[STEPS - 1 - i].expand(2, -1, -1, -1))
    settings = EditSettings.model_validate(
        {"count": 1, "edits": edits, "resolution": SIDE, "steps": STEPS + 1, "skip": 0.12}
    )
    editor = PairEditor(BaseAlone(tiny), settings)
    ours, touched = editor.latents(editor.encode(SourcePair(0, "p", shown, grey)), seed=0)
    assert (ours[0] - ours[1]).abs().max() < 1e-4  # the two rows are the same image
    scale = float(theirs.abs().max())
    assert float((ours[:1] - theirs).abs().max()) / scale < 5e-5  # measured: 2e-6
    assert bool(touched.any()) == bool(edits)
    if edits:
        unedited, _, _, _ = _diffusers(tiny, shown, [])
        assert (theirs - unedited).abs().max() > 0.1  # the edits do something
        assert torch.equal(touched, masks)
    assert torch.isfinite(their_z).all()


class UnpaddedLengths:
    """A tokenizer whose `length` does not count the padding, as the pipeline expects."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Any, **options: Any) -> Any:
        found = self._tokenizer(texts, **options)
        if options.get("return_length"):
            found["length"] = found["attention_mask"].sum(dim=1)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def _diffusers(
    base: Base, image: np.ndarray[Any, Any], edits: list[dict[str, Any]]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Edited latents, the noise maps, the noise drawn (least noisy step first), the cells ever in a mask."""
    from diffusers import LEditsPPPipelineStableDiffusion

    config = {k: v for k, v in base.scheduler_config.items() if not k.startswith("_")}
    pipe = LEditsPPPipelineStableDiffusion(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=UnpaddedLengths(base.tokenizer),
        unet=share_weights(base.unet),
        scheduler=DPMSolverMultistepScheduler.from_config(config | _EXACT),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.invert(
        Image.fromarray(image),
        num_inversion_steps=STEPS,
        skip=1 / STEPS,
        generator=torch.Generator().manual_seed(7),
    )
    draws = torch.Generator().manual_seed(7)
    shape = pipe.init_latents.shape
    noise = [torch.randn(shape, generator=draws) for _ in range(STEPS)]
    asked: dict[str, Any] = {"editing_prompt": None}
    if edits:
        asked = {
            "editing_prompt": [edit["text"] for edit in edits],
            "edit_guidance_scale": [edit["strength"] for edit in edits],
            "edit_threshold": [edit["threshold"] for edit in edits],
            "edit_warmup_steps": [edit.get("warmup", 0) for edit in edits],
            "edit_cooldown_steps": [edit.get("cooldown", STEPS) for edit in edits],
            "reverse_editing_direction": [edit.get("direction") == "remove" for edit in edits],
        }
    found = pipe(output_type="latent", use_cross_attn_mask=bool(edits), use_intersect_mask=True, **asked)
    touched = torch.zeros(shape[-2:], dtype=torch.bool)
    if edits:
        touched = (pipe.activation_mask.amax(dim=(0, 1, 2, 3)) > 0).reshape(shape[-2:])
    return found.images, pipe.zs, noise, touched
